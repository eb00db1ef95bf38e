"""Describes the stages of a sharded potential for a trace: its inputs end with exchanges and with extended inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_januspipe.capture.stages.captured import CapturedPotential, CapturedStage
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.graph.traced_exchange import TracedExchange


@dataclass(frozen=True)
class ExchangeSpec:
    """Describes an exchange among the values that a stage reads.

    Attributes:
        rows: the class of rows that are exchanged, by a size symbol that counts them.
    """

    rows: str

    @property
    def halo(self) -> str:
        """Returns the size symbol of the number of halo rows."""
        return f"halo_{self.rows}"

    @property
    def handle(self) -> str:
        """Returns the name under which graphs take the exchange's handle, as one of their sizes."""
        return f"handle_{self.rows}"

    def example(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns sizes for the sizes of an example call: nothing is known of halos before structures are sharded."""
        return {self.halo: sizes[self.rows], self.handle: 2}

    def traced(self, sizes: Mapping[str, Any]) -> TracedExchange:
        """Returns the exchange that a trace takes.

        Args:
            sizes: symbolic sizes.
        """
        return TracedExchange(sizes[self.handle], sizes[self.halo])


@dataclass(frozen=True, kw_only=True)
class PotentialWithExchanges(CapturedPotential):
    """Holds a captured potential into which exchanges were inserted.

    Attributes:
        added: specs of the inputs after the potential's own, by name.
        rows_of_symbols: size symbols that count sharded rows -> the class of these.
    """

    added: Mapping[str, TensorSpec | ExchangeSpec]
    rows_of_symbols: Mapping[str, str]

    @override
    def stage(self, index: int, potential: nn.Module) -> StageWithExchanges:
        """Returns one stage."""
        return StageWithExchanges(self, index, potential)


class StageWithExchanges(CapturedStage):
    """Runs one stage of a sharded potential on the rows of one rank.

    Args:
        sharded: the potential with exchanges.
        index: position of this stage in the chain.
        potential: the live potential.
    """

    def __init__(self, sharded: PotentialWithExchanges, index: int, potential: nn.Module) -> None:
        super().__init__(sharded, index, potential)
        self._sharded = sharded
        places = {name: place for place, name in enumerate(sharded.program.inputs)}
        self._exchanges = {spec: places[name] for name, spec in sharded.added.items() if isinstance(spec, ExchangeSpec)}

    @property
    @override
    def rows_of_symbols(self) -> Mapping[str, str]:
        """Maps size symbols that count sharded rows to the class of these."""
        return self._sharded.rows_of_symbols

    @property
    @override
    def value_specs(self) -> list[Any]:
        """Returns the specs of :meth:`values`."""
        added, program = self._sharded.added, self._sharded.program
        return [added[n] if n in added else program.spec(n) for n in self.function.names]

    @property
    @override
    def exchange_specs(self) -> Sequence[ExchangeSpec]:
        """Returns the specs of all exchanges: shapes have halo rows where the stage exchanges none."""
        return list(self._exchanges)

    @override
    def sizes(self, tensors: Sequence[Any]) -> list[dict[str, int]]:
        """Returns the values of the size symbols on this rank, and then on the other graph ranks.

        Every rank has planned the shards of all ranks, so that all find the same.
        """
        own = super().sizes(tensors)[0]
        exchanges = {spec: tensors[place] for spec, place in self._exchanges.items()}
        own |= {spec.handle: exchange.handle for spec, exchange in exchanges.items()}
        shards = {spec.rows: exchange.shard for spec, exchange in exchanges.items()}
        first = next(iter(shards.values()))
        ranks = [first.rank, *(r for r in range(first.num_ranks) if r != first.rank)]
        return [
            own
            | {symbol: shards[rows].counts[r] for symbol, rows in self._sharded.rows_of_symbols.items()}
            | {spec.halo: shards[spec.rows].halo_counts[r] for spec in exchanges}
            for r in ranks
        ]
