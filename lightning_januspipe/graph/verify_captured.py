"""Proof that the exchanges of a sharded potential are right: all graph ranks in lock-step in one process.

Every operation runs on the rows of each rank in turn, exchanges on those of all. Energies, derivatives and the
parameter gradient of a force loss have to be those of the whole micro-batch. That the exchanges' own backward passes
are their transposes is not a matter of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential, independent_coordinates
from lightning_januspipe.capture.trace.function import PlaceholderValues, new_leaf
from lightning_januspipe.capture.trace.operators import target_function
from lightning_januspipe.capture.trace.program import Node, replace_refs
from lightning_januspipe.capture.validate.against_eager import rounding_tolerance, smallest_scale
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.errors import CaptureError, shown
from lightning_januspipe.graph import exchange_ops
from lightning_januspipe.graph.placement import REPLICATE, Placement, no_exchange
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder
from lightning_januspipe.graph.sharded_potential import ShardedPotential
from lightning_januspipe.graph.shards import Shard


def compare_in_lock_step(
    captured: CapturedPotential,
    with_exchanges: CapturedPotential,
    sharded: ShardedPotential,
    potential: nn.Module,
    tensors: Sequence[Tensor],
    num_ranks: int,
) -> None:
    """Compares a micro-batch that is sharded over graph ranks with the whole one.

    Args:
        captured: the potential.
        with_exchanges: the same with exchanges.
        sharded: how it is sharded.
        potential: the live potential.
        tensors: the inputs of a micro-batch.
        num_ranks: G.

    Raises:
        CaptureError: they differ.
    """
    sharder = MicrobatchSharder(sharded, potential, num_ranks)
    plan = sharder.plan_scattered(tensors)  # dealt whole, nothing would be exchanged
    parts = [sharder.shard(tensors, plan, rank) for rank in range(num_ranks)]
    own, program = captured.program.inputs, with_exchanges.program
    names = [*own, *program.inputs[len(program.inputs) - len(parts[0].extended) :]]
    inputs = [dict(zip(names, [*p.tensors, *p.extended], strict=True)) for p in parts]
    of_ranks = _LockStep(with_exchanges, potential, inputs, plan.shards, sharded.derivatives)
    same = [REPLICATE] * len(sharded.derivatives)
    whole = _LockStep(captured, potential, [dict(zip(own, tensors, strict=True))], {}, same)
    weights: list[Tensor] = []
    expected = whole.results([REPLICATE] * len(sharded.observables), weights)
    found = of_ranks.results(sharded.observables, weights)
    require_same(expected, found, rounding_tolerance(captured, potential), captured.path, num_ranks)


def require_same(
    expected: Sequence[tuple[str, Tensor]],
    found: Sequence[tuple[str, Tensor]],
    tolerance: float,
    path: str,
    num_ranks: int,
    why: str = "It combines atoms or edges in a way that was not recognized.",
) -> None:
    """Compare what a sharded micro-batch gives with what the whole one does.

    Args:
        expected: energies, derivatives and parameter gradients of the whole one, each with words for it.
        found: the same of the sharded one.
        tolerance: largest error, relative to the largest entry; of parameter gradients that of all.
        path: of the potential.
        num_ranks: graph ranks.
        why: usual causes.

    Raises:
        CaptureError: they differ.
    """
    floor = smallest_scale([a for what, a in expected if what.startswith(DERIVATIVE)], tolerance)
    for (what, a), (_, b) in zip(expected, found, strict=True):
        scale = max(float(a.abs().max()) if a.numel() else 0.0, floor)
        if what.startswith(GRADIENT):
            scale = max(float(x.abs().max()) for w, x in expected if w.startswith(GRADIENT))
        error = float((a - b).abs().max()) if a.numel() and a.shape == b.shape else 0.0
        if a.shape != b.shape or not error <= tolerance * max(scale, 1e-12):
            raise CaptureError(
                f"graph_size > 1 is not possible: sharded over {num_ranks} ranks, {what} of the potential "
                f"{shown(path)} differs by {error:.2e} at a scale of {scale:.2e}. {why} Or use graph_size=1."
            )


DERIVATIVE = "the derivative by "
"""How derivatives of the energy are named, before the coordinate's name."""

GRADIENT = "the parameter gradient of a force loss for "
"""How parameter gradients are named, before the parameter's name."""


def draw_weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Weights of :func:`force_loss` for each number of each output."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for x in outputs:
        # Of order one, whatever the units: derivatives in half precision must not overflow.
        scale = max(1.0, float(x.detach().abs().max())) if x.numel() else 1.0
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        weights.append((drawn / (scale * max(1, x.numel()) ** 0.5)).to(x))
    return weights


def force_loss(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Terms of a loss that depends on every number of every output that can be differentiated."""
    return [
        ((x * w).square() + x * w).sum()
        for x, w in zip(outputs, weights, strict=True)
        if x.is_floating_point() and x.requires_grad
    ]


class _LockStep:
    """A program on the rows of several ranks, as one function."""

    def __init__(
        self,
        captured: CapturedPotential,
        potential: nn.Module,
        parts: Sequence[dict[str, Tensor]],
        shards: dict[str, list[Shard]],
        derivatives: Sequence[Placement],
    ) -> None:
        program = captured.program
        self._captured, self._program, self._shards, self._kinds = captured, program, shards, derivatives
        forward = {*captured.regions.geometry, *captured.regions.body}
        own = [n for n in program.nodes if n.op == "placeholder" and n.name not in program.inputs]
        placeholders = PlaceholderValues(program, potential, [n.name for n in own])
        common = dict(zip([n.name for n in own], placeholders.values([]), strict=True))
        values: list[dict[str, Any]] = [dict(common) for _ in parts]
        for part, of_rank in zip(parts, values, strict=True):
            of_rank.update(part)
        self._values = values
        self._leaves: list[list[Tensor]] = [[] for _ in program.coordinates]
        independent = set(independent_coordinates(program))
        with torch.enable_grad(), autocast_as(OFF):
            for node in program.nodes:
                if node.name in forward:
                    self._run(node)
                if node.name in program.coordinates:
                    self._differentiate(node.name, node.name in independent)
        live = dict(potential.named_parameters())
        self._parameters = {n: live[n] for n in program.parameters.values() if n in live and live[n].requires_grad}

    def _run(self, node: Node) -> None:
        exchanged = _EXCHANGES.get(node.target)
        if exchanged is not None:
            given, exchange, dim = node.args
            rows = self._shards[exchange.name.removeprefix("exchange_")]
            results = exchanged([v[given.name] for v in self._values], rows, dim)
        else:
            function = target_function(node.target)
            try:
                results = [
                    function(*replace_refs(node.args, v.__getitem__), **replace_refs(node.kwargs, v.__getitem__))
                    for v in self._values
                ]
            except Exception as error:
                raise no_exchange(node, f"fails on the rows of one rank ({type(error).__name__}: {error})") from error
        for of_rank, result in zip(self._values, results, strict=True):
            of_rank[node.name] = result

    def _differentiate(self, name: str, is_independent: bool) -> None:
        place = self._program.coordinates.index(name)
        if is_independent:
            leaves = [new_leaf(v[name]) for v in self._values]
            if not self._kinds[place].is_sharded:
                leaves = leaves[:1] * len(leaves)
            for of_rank, leaf in zip(self._values, leaves, strict=True):
                of_rank[name] = leaf
        self._leaves[place] = [v[name] for v in self._values]

    def results(self, observables: Sequence[Placement], weights: list[Tensor]) -> list[tuple[str, Tensor]]:
        """Observables, derivatives and parameter gradients, each with words for it.

        Args:
            observables: what they are to the ranks.
            weights: of the loss; drawn if there are none yet.
        """
        energies = [self._values[0][n] for n in self._program.energies]
        inputs = [x for leaves in self._leaves for x in dict.fromkeys(leaves)]
        roots = [e.sum() for e in energies if e.requires_grad]
        with torch.enable_grad(), autocast_as(self._program.autocast):
            found = iter(
                torch.autograd.grad(roots, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
            )
        outputs = []
        for name, value in zip(self._captured.regions.observables, observables, strict=True):
            outputs.append((f"output {name}", self._joined([v[name] for v in self._values], value)))
        for name, leaves, value in zip(self._program.coordinates, self._leaves, self._kinds, strict=True):
            gradients = [next(found) for _ in dict.fromkeys(leaves)]
            if not value.is_sharded:  # what each rank computes from a copy of its own
                gradients = [torch.stack(gradients).sum(0)]
            outputs.append((f"{DERIVATIVE}{name}", self._joined(gradients, value)))
        if not weights:
            weights += draw_weights([x for _, x in outputs])
        terms = force_loss([x for _, x in outputs], weights)
        trained = torch.autograd.grad(terms, list(self._parameters.values()), allow_unused=True, materialize_grads=True)
        named = [(f"{GRADIENT}{n!r}", g) for n, g in zip(self._parameters, trained, strict=True)]
        return [*((what, x.detach()) for what, x in outputs), *named]

    def _joined(self, of_ranks: Sequence[Tensor], value: Placement) -> Tensor:
        if not value.is_sharded:
            return of_ranks[0]
        order = self._shards[value.rows][0].order.to(of_ranks[0].device)
        return torch.cat(list(of_ranks), value.dim).index_select(value.dim, order)


def _gather_halo(values: Sequence[Tensor], shards: Sequence[Shard], dim: int) -> list[Tensor]:
    everything = torch.cat(list(values), dim).index_select(dim, shards[0].order.to(values[0].device))
    halos = [everything.index_select(dim, s.halo.to(everything.device)) for s in shards]
    return [torch.cat(pair, dim) for pair in zip(values, halos, strict=True)]


def _sum_halo(values: Sequence[Tensor], shards: Sequence[Shard], dim: int) -> list[Tensor]:
    shape = list(values[0].shape)
    shape[dim] = shards[0].num_rows
    total = values[0].new_zeros(shape)
    for value, shard in zip(values, shards, strict=True):
        total = total.index_add(dim, torch.cat([shard.own, shard.halo]).to(value.device), value)
    return [total.index_select(dim, s.own.to(total.device)) for s in shards]


def _max_halo(values: Sequence[Tensor], shards: Sequence[Shard], dim: int) -> list[Tensor]:
    shape = list(values[0].shape)
    shape[dim] = shards[0].num_rows
    largest = values[0].new_full(shape, -math.inf)
    for value, shard in zip(values, shards, strict=True):
        rows = torch.cat([shard.own, shard.halo]).to(value.device)
        held = torch.maximum(largest.index_select(dim, rows), value.detach())
        largest = largest.index_copy(dim, rows, held)
    own = [largest.index_select(dim, s.own.to(largest.device)) for s in shards]
    are_largest = [v.detach() == g for v, g in zip(values, _gather_halo(own, shards, dim), strict=True)]
    counts = _sum_halo([a.to(v.dtype) for a, v in zip(are_largest, values, strict=True)], shards, dim)
    kept = [torch.where(a, v, torch.zeros_like(v)) for a, v in zip(are_largest, values, strict=True)]
    return [s / n for s, n in zip(_sum_halo(kept, shards, dim), counts, strict=True)]


def _with_low_room(values: Sequence[Tensor], shards: Sequence[Shard], dim: int) -> list[Tensor]:
    return [
        torch.cat([x, x.new_full([s.num_halo if d == dim else n for d, n in enumerate(x.shape)], -math.inf)], dim)
        for x, s in zip(values, shards, strict=True)
    ]


def _with_room(values: Sequence[Tensor], shards: Sequence[Shard], dim: int) -> list[Tensor]:
    return [
        torch.cat([x, x.new_zeros([s.num_halo if d == dim else n for d, n in enumerate(x.shape)])], dim)
        for x, s in zip(values, shards, strict=True)
    ]


def _sum(values: Sequence[Tensor], _: Sequence[Shard], __: int) -> list[Tensor]:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return [total] * len(values)


def _same(values: Sequence[Tensor], _: Sequence[Shard], __: int) -> list[Tensor]:
    return list(values)


_EXCHANGES: dict[Any, Callable[[Sequence[Tensor], Sequence[Shard], int], list[Tensor]]] = {
    exchange_ops.gather_halo: _gather_halo,
    exchange_ops.sum_halo: _sum_halo,
    exchange_ops.with_room: _with_room,
    exchange_ops.max_halo: _max_halo,
    exchange_ops.with_low_room: _with_low_room,
    exchange_ops.sum_over_ranks: _sum,
    exchange_ops.replicate: _same,
    exchange_ops.count_once: _same,
}
