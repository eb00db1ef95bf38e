"""Shards micro-batches over graph ranks before their first phase, and gathers their results for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.graph.collectives import collect_rows
from lightning_januspipe.graph.exchange import Exchange
from lightning_januspipe.graph.half_rows import HalfRows, RowLayout
from lightning_januspipe.graph.placement import Placement
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder, ShardPlan
from lightning_januspipe.graph.sharded_potential import RankPotential
from lightning_januspipe.graph.sharding import shard_potential
from lightning_januspipe.graph.shards import Shard


@dataclass(frozen=True)
class GraphGroup:
    """Names the ranks that share the atoms of each micro-batch.

    Attributes:
        size: G, the number of graph ranks.
        rank: index of this rank among them.
        group: their process group.
    """

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Replica:
    """Names the ranks that hold the same micro-batches: the graph ranks of all stages.

    Attributes:
        size: number of these ranks.
        rank: index of this rank among them.
        group: their process group, for tensors on the CPU.
    """

    size: int
    rank: int
    group: dist.ProcessGroup


class GraphAxis:
    """Shards the micro-batches of one rank's pipeline, and gathers their results.

    Args:
        captured: the potential in stages.
        potential: the live potential.
        ranks: the graph ranks.
        dtype: what halos of training are rounded to on the way; None to send them as they are.

    Attributes:
        size: G, the number of graph ranks.
        rank: index of this rank among them.

    Raises:
        CaptureError: the potential cannot be sharded.
    """

    def __init__(
        self,
        captured: StagedPotential,
        potential: nn.Module,
        ranks: GraphGroup,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        self._sharded = shard_potential(captured, potential)
        self.size, self.rank = ranks.size, ranks.rank
        self._group: dist.ProcessGroup | None = ranks.group
        self._sharder = MicrobatchSharder(self._sharded, potential, ranks.size)
        self._exchanges: dict[int, dict[str, Exchange]] = {}

    @property
    def potential(self) -> RankPotential:
        """Returns the potential whose stages work on this rank's own rows."""
        return self._sharded.potential

    def shard_inputs(self, tensors: Sequence[Tensor]) -> MicrobatchInput:
        """Returns the only micro-batch of a step with this rank's rows only.

        Args:
            tensors: the inputs of the whole micro-batch, the same on all graph ranks.
        """
        return self._own(0, tensors, self._sharder.plan_balanced(tensors))

    def scatter_inputs(self, tensors: Sequence[Tensor], over: int | None = None) -> MicrobatchInput:
        """Does the same in the worst way, for validation; see :meth:`.MicrobatchSharder.plan_scattered`."""
        return self._own(0, tensors, self._sharder.plan_scattered(tensors, over))

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """Sums a tensor over the graph ranks, in place.

        Raises:
            RankLostError: a rank did not answer.
        """
        with waiting("sum over graph ranks", self._group):
            dist.all_reduce(tensor, group=self._group)

    def shard_step_inputs(
        self, inputs: Sequence[MicrobatchInput], replica: Replica, owners_in_loader: Sequence[Tensor | None] = ()
    ) -> list[MicrobatchInput]:
        """Returns all micro-batches of a step with this rank's rows only.

        The ranks of a replica take turns: each chooses the owners of atoms for a few micro-batches, and sends them to
        the others. So no two ranks can disagree, even where their positions differ in the last digit.

        Args:
            inputs: the whole micro-batches, the same on all ranks of the replica.
            replica: the ranks of the replica; all of them have to call this.
            owners_in_loader: the owners that the loader chose for each micro-batch; None, or nothing, where it did not.

        Raises:
            RankLostError: a rank did not answer.
        """
        looks = [self._sharder.read_indices(given.tensors) for given in inputs]
        sizes = [self._sharder.num_atoms(look) for look in looks]
        told = torch.zeros(sum(sizes), dtype=torch.int32)
        of_microbatch = told.split(sizes)
        for index in range(replica.rank, len(inputs), replica.size):
            chosen = owners_in_loader[index] if index < len(owners_in_loader) else None
            if chosen is None or len(chosen) != sizes[index]:
                chosen = self._sharder.choose_owners(inputs[index].tensors, looks[index])
            of_microbatch[index].copy_(chosen)
        with waiting("exchange of the owners of atoms", replica.group):
            dist.all_reduce(told, group=replica.group)
        owners = told.to(torch.int64).split(sizes)
        plans = [self._sharder.plan(look, o) for look, o in zip(looks, owners, strict=True)]
        pairs = enumerate(zip(inputs, plans, strict=True))
        return [self._own(i, given.tensors, plan, self._dtype) for i, (given, plan) in pairs]

    def _own(
        self, index: int, tensors: Sequence[Tensor], plan: ShardPlan, dtype: torch.dtype | None = None
    ) -> MicrobatchInput:
        own = self._sharder.shard(tensors, plan, self.rank)
        exchanges = {name: Exchange(shard, self._group) for name, shard in own.shards.items()}
        if dtype is not None:
            types = self._sharded.types
            for name, exchange in exchanges.items():
                is_typed = types is not None and self._sharded.rows.get((types, 0)) == name
                of_rows = tensors[types] if types is not None and is_typed else None
                exchange.half = _half_rows(exchange.shard, of_rows, dtype)
        self._exchanges[index] = exchanges
        return MicrobatchInput([*own.tensors, *exchanges.values(), *own.extended], own.symbols)

    def gather_results(
        self, index: int, observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns observables and derivatives of all rows, for the user's loss; all graph ranks have to call this."""
        kinds = self._sharded
        return (
            [self._all_rows(index, y, v) for y, v in zip(observables, kinds.observables, strict=True)],
            [self._all_rows(index, x, v) for x, v in zip(derivatives, kinds.derivatives, strict=True)],
        )

    def own_gradients(self, index: int, gradients: LossGradients) -> LossGradients:
        """Returns the loss's gradients for this rank's rows; every graph rank has evaluated the same loss."""
        kinds = self._sharded
        return LossGradients(
            [self._own_rows(index, y, v) for y, v in zip(gradients.observables, kinds.observables, strict=True)],
            [self._rows(index, x, v) for x, v in zip(gradients.derivatives, kinds.derivatives, strict=True)],
        )

    def clear(self) -> None:
        """Forgets all micro-batches."""
        self._exchanges.clear()

    def close(self) -> None:
        """Drops all references to the process group, in exchanges too, so that its connections can be closed."""
        for of_microbatch in self._exchanges.values():
            for exchange in of_microbatch.values():
                exchange.close()
        self._group = None

    def _all_rows(self, index: int, value: Tensor, kind: Placement) -> Tensor:
        if not kind.is_sharded:
            return value
        exchange = self._exchanges[index][kind.rows]
        if kind.dim == 0:
            return collect_rows(value, exchange)
        return collect_rows(value.movedim(kind.dim, 0), exchange).movedim(0, kind.dim)

    def _own_rows(self, index: int, value: Tensor | None, kind: Placement) -> Tensor | None:
        return None if value is None else self._rows(index, value, kind)

    def _rows(self, index: int, value: Tensor, kind: Placement) -> Tensor:
        if not kind.is_sharded:
            return value
        return value.index_select(kind.dim, self._exchanges[index][kind.rows].shard.own)


def _half_rows(shard: Shard, types: Tensor | None, dtype: torch.dtype) -> HalfRows:
    """Returns how rows of a class travel in half precision.

    Args:
        shard: this rank's shard.
        types: (num_rows,) type of each row on all ranks; None for rows of one type.
        dtype: what rows are rounded to.
    """
    if types is None:
        types = shard.own.new_zeros(shard.num_rows)
    own, halo = types[shard.own], types[shard.halo]
    send = RowLayout.of(own[shard.send], shard.send_counts)
    return HalfRows(dtype, send, RowLayout.of(halo, shard.receive_counts))
