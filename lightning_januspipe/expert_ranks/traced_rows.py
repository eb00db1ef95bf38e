"""Makes exchanges of rows operators of torch, and describes stages with them for a trace, as graph ranks do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.capture.stages.captured import CapturedPotential, CapturedStage
from lightning_januspipe.engine.specs import TensorSpec, evaluate
from lightning_januspipe.expert_ranks.row_exchange import RowExchange
from lightning_januspipe.graph.exchange import exchange_of
from lightning_januspipe.graph.traced_exchange import NAMESPACE


class TracedRowExchange(RowExchange):
    """Stands for the exchanges of rows of all micro-batches while a stage is traced.

    Args:
        handle: the input of the graph with the handle of an exchange.
        num_received: the input of the graph with the number of rows for this rank's experts.
    """

    def __init__(self, handle: int, num_received: int) -> None:
        self._handle, self._num_received = handle, num_received

    def sent(self, x: Tensor) -> Tensor:
        """Returns what :meth:`.RowExchange.sent` returns, as one operation."""
        return self._operation("send_rows", x, self._num_received)

    def returned(self, y: Tensor, num_rows: int) -> Tensor:
        """Returns what :meth:`.RowExchange.returned` returns, as one operation."""
        return self._operation("return_rows", y, num_rows)

    def _operation(self, name: str, x: Tensor, num_rows: int) -> Tensor:
        found: Tensor = getattr(getattr(torch.ops, NAMESPACE), name)(x, self._handle, num_rows)
        return found


def _register(name: str, run_with: Callable[[RowExchange, Tensor, int], Tensor]) -> None:
    """Registers an operator ``(x, handle, num_rows, after) -> y``, with ``num_rows`` rows in its result."""

    def run(x: Tensor, handle: int, num_rows: int, after: Tensor | None = None) -> Tensor:
        found = run_with(exchange_of(handle), x, num_rows).contiguous()
        assert found.shape[0] == num_rows, "the graph has the sizes of another micro-batch"
        return found

    def fake(x: Tensor, handle: int, num_rows: int, after: Tensor | None = None) -> Tensor:
        return x.new_empty(num_rows, *x.shape[1:])

    qualified = f"{NAMESPACE}::{name}"
    schema = "(Tensor x, SymInt handle, SymInt num_rows, Tensor? after=None) -> Tensor"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)


_register("send_rows", lambda exchange, x, _: exchange.sent(x))
_register("return_rows", lambda exchange, y, num_rows: exchange.returned(y, num_rows))


@dataclass(frozen=True)
class RowExchangeSpec:
    """Describes an exchange of rows among the values that a stage reads.

    Attributes:
        site: the value with the expert of each row.
        rows: its number of rows, as an expression of size symbols.
        num_held: the number of experts that this rank holds outside of steps, if it may hold more in a step; else None.
    """

    site: str
    rows: int | str
    num_held: int | None = field(default=None, repr=False)  # graphs are right for any number

    @property
    def received(self) -> str:
        """Returns the size symbol of the number of rows for this rank's experts."""
        return f"received_{self.site}"

    @property
    def handle(self) -> str:
        """Returns the name under which graphs take the exchange's handle, as one of their sizes."""
        return f"handle_{self.site}"

    @property
    def held(self) -> str:
        """Returns the size symbol of the number of experts that this rank holds, if that may change."""
        return f"held_{self.site}"

    def example(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns sizes for those of an example call, in which a rank gets as many rows as it has."""
        rows = self.rows if isinstance(self.rows, int) else int(evaluate(self.rows, sizes))
        held = {} if self.num_held is None else {self.held: self.num_held + 1}
        return {self.received: rows, self.handle: 2, **held}

    def traced(self, sizes: Mapping[str, Any]) -> TracedRowExchange:
        """Returns the exchange that a trace takes.

        Args:
            sizes: symbolic sizes.
        """
        return TracedRowExchange(sizes[self.handle], sizes[self.received])


@dataclass(frozen=True, kw_only=True)
class PotentialWithExperts(CapturedPotential):
    """Holds a captured potential into which exchanges of rows were inserted.

    Attributes:
        given: the potential without them.
        added: specs of the inputs after those of ``given``, by name.
        own: specs of the weights with the entries of this rank's experts, by placeholder.
    """

    given: CapturedPotential
    added: Mapping[str, TensorSpec | RowExchangeSpec]
    own: Mapping[str, TensorSpec]

    @override
    def stage(self, index: int, potential: nn.Module) -> StageWithExperts:
        """Returns one stage."""
        return StageWithExperts(self, index, potential)


class StageWithExperts(CapturedStage):
    """Runs one stage whose rows travel to the ranks of their experts.

    Args:
        spread: the potential with exchanges of rows.
        index: position of this stage in the chain.
        potential: the live potential.
    """

    def __init__(self, spread: PotentialWithExperts, index: int, potential: nn.Module) -> None:
        super().__init__(spread, index, potential)
        self._given = spread.given.stage(index, potential)
        specs = dict(zip(self._given.function.names, self._given.value_specs, strict=True))
        self._specs: dict[str, Any] = {**specs, **spread.added, **spread.own}
        self._num_given = len(spread.given.program.inputs)
        places = {name: place for place, name in enumerate(spread.program.inputs)}
        read = {name: spread.added[name] for name in self.function.names if name in spread.added}
        self._exchanges = {spec: places[name] for name, spec in read.items() if isinstance(spec, RowExchangeSpec)}

    @property
    @override
    def rows_of_symbols(self) -> Mapping[str, str]:
        """Maps size symbols that count rows sharded over graph ranks to the class of these."""
        return self._given.rows_of_symbols

    @property
    @override
    def value_specs(self) -> list[Any]:
        """Returns the specs of :meth:`values`."""
        return [self._specs[n] for n in self.function.names]

    @property
    @override
    def exchange_specs(self) -> Sequence[Any]:
        """Returns the specs of all exchanges between graph ranks, and of the exchanges of rows that it reads."""
        return [*self._given.exchange_specs, *self._exchanges]

    @override
    def sizes(self, tensors: Sequence[Any]) -> list[dict[str, int]]:
        """Returns the values of the size symbols on this rank, and then on all ranks that hold the stage.

        What ranks have told each other before the step is in the exchanges: see :class:`~.step_plans.ExpertAxis`.
        """
        own, *of_others = self._given.sizes(tensors[: self._num_given])
        exchanges = {spec: tensors[place] for spec, place in self._exchanges.items()}
        for spec, exchange in exchanges.items():
            own |= {spec.handle: exchange.handle, spec.received: exchange.num_received}
            own |= {} if spec.num_held is None else {spec.held: exchange.num_held}
        for exchange in exchanges.values():
            return [own, *(own | told for told in exchange.sizes_of_ranks)]
        return [own, *of_others]
