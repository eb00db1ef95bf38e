"""Verifies that the exchanges of a sharded potential are right: with all graph ranks in lock-step in one process.

Every operation runs on the rows of each rank in turn, exchanges on those of all. Energies, derivatives and the
parameter gradient of a force loss have to be those of the whole micro-batch. That each exchange's backward pass is its
transpose does not depend on the model, and is left to the package's tests.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential, independent_coordinates
from lightning_januspipe.capture.trace.function import PlaceholderValues, new_leaf
from lightning_januspipe.capture.trace.graph_walks import ancestors
from lightning_januspipe.capture.trace.operators import target_function
from lightning_januspipe.capture.trace.program import Node, replace_refs
from lightning_januspipe.capture.validate.against_eager import gradient_groups, rounding_tolerance, smallest_scale
from lightning_januspipe.capture.validate.probe_loss import probe_loss
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.errors import CaptureError, quoted
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
    gradient_bytes: float | None = None,
) -> None:
    """Compares a micro-batch that is sharded over graph ranks with the whole one.

    Args:
        captured: the potential.
        with_exchanges: the same with exchanges.
        sharded: how it is sharded.
        potential: the live potential.
        tensors: the inputs of a micro-batch.
        num_ranks: G.
        gradient_bytes: the most bytes of parameter gradients that are there at once, twice; None for all.

    Raises:
        CaptureError: they differ.
    """
    sharder = MicrobatchSharder(sharded, potential, num_ranks)
    plan = sharder.plan_scattered(tensors)  # with whole structures on each rank nothing would be exchanged
    parts = [sharder.shard(tensors, plan, rank) for rank in range(num_ranks)]
    own, program = captured.program.inputs, with_exchanges.program
    names = [*own, *program.inputs[len(program.inputs) - len(parts[0].extended) :]]
    inputs = [dict(zip(names, [*p.tensors, *p.extended], strict=True)) for p in parts]
    of_ranks = LockStep(with_exchanges, potential, inputs, plan.shards, sharded.derivatives)
    same = [REPLICATE] * len(sharded.derivatives)
    whole = LockStep(captured, potential, [dict(zip(own, tensors, strict=True))], {}, same)
    expected = whole.results([REPLICATE] * len(sharded.observables))
    found = of_ranks.results(sharded.observables)

    def pairs() -> Iterator[tuple[NamedTensors, NamedTensors]]:
        yield expected, found
        for parameters in gradient_groups(potential, gradient_bytes):
            yield whole.gradients(parameters), of_ranks.gradients(parameters)

    require_same(pairs(), rounding_tolerance(captured, potential), captured.path, num_ranks)


NamedTensors = Sequence[tuple[str, Tensor]]


def require_same(
    pairs: Iterable[tuple[NamedTensors, NamedTensors]],
    tolerance: float,
    path: str,
    num_ranks: int,
    why: str = "The potential combines atoms or edges in a way that was not recognized.",
) -> None:
    """Compares what a sharded micro-batch gives with what the whole one gives.

    Args:
        pairs: energies, derivatives and parameter gradients of the whole one, each with its name, and the same of the
            sharded one; all together, or energies and derivatives first, and then some gradients after the other.
        tolerance: largest error, relative to the largest entry; of parameter gradients, to the largest entry of all.
        path: dotted name of the potential.
        num_ranks: G.
        why: usual causes.

    Raises:
        CaptureError: they differ.
    """
    errors: list[tuple[str, float, float]] = []
    for pair in pairs:
        errors += _errors(*pair, tolerance)
        del pair  # before the next gradients are computed
    largest_gradient = max((scale for what, _, scale in errors if what.startswith(GRADIENT)), default=0.0)
    for what, error, own_scale in errors:
        scale = largest_gradient if what.startswith(GRADIENT) else own_scale
        if not error <= tolerance * max(scale, 1e-12):
            raise CaptureError(
                f"graph_size > 1 is not possible: sharded over {num_ranks} ranks, {what} of the potential "
                f"{quoted(path)} differs by {error:.2e} at a scale of {scale:.2e}. {why} Or use graph_size=1."
            )


def _errors(expected: NamedTensors, found: NamedTensors, tolerance: float) -> list[tuple[str, float, float]]:
    """Returns for each value its name, its largest error, and the scale at which it is compared."""
    floor = smallest_scale([a for what, a in expected if what.startswith(DERIVATIVE)], tolerance)
    return [
        (
            what,
            math.inf if a.shape != b.shape else float((a - b).abs().max()) if a.numel() else 0.0,
            max(float(a.abs().max()) if a.numel() else 0.0, 0.0 if what.startswith(GRADIENT) else floor),
        )
        for (what, a), (_, b) in zip(expected, found, strict=True)
    ]


DERIVATIVE = "the derivative by "
"""How derivatives of the energy are named, before the coordinate's name."""

GRADIENT = "the parameter gradient of a force loss for "
"""How parameter gradients are named, before the parameter's name."""


class LockStep:
    """Runs a program on the rows of several ranks, one operation of all ranks after the other.

    Args:
        captured: the potential.
        potential: the live potential.
        inputs: the inputs of each rank, by name.
        shards: for each class of rows the shards of all ranks.
        derivatives: placements of the differentiation inputs.
    """

    def __init__(
        self,
        captured: CapturedPotential,
        potential: nn.Module,
        inputs: Sequence[dict[str, Tensor]],
        shards: dict[str, list[Shard]],
        derivatives: Sequence[Placement],
    ) -> None:
        program = captured.program
        self._captured, self._program, self._shards, self._derivatives = captured, program, shards, derivatives
        names = [n.name for n in program.nodes if n.is_placeholder and n.name not in program.inputs]
        common = dict(zip(names, PlaceholderValues(program, potential, names).values([]), strict=True))
        self._values: list[dict[str, Any]] = [{**common, **of_rank} for of_rank in inputs]
        self._leaves: list[list[Tensor]] = [[] for _ in program.coordinates]
        results = [*program.energies, *program.coordinates, *captured.regions.observables]
        forward = ancestors(program, results) & {*captured.regions.geometry, *captured.regions.body}
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
        """Runs an operation on each rank's values, or an exchange on those of all ranks."""
        exchange = _EXCHANGES.get(node.target)
        if exchange is not None:
            given, of_class, dim = node.args
            shards = self._shards[of_class.name.removeprefix("exchange_")]
            values = [v[given.name] for v in self._values]
            results = exchange([x.movedim(dim, 0) if dim else x for x in values], shards)
            results = [x.movedim(0, dim) if dim else x for x in results]
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
        """Makes leaves of a differentiation input that depends on no other one; a replicated one has one leaf."""
        place = self._program.coordinates.index(name)
        if is_independent:
            leaves = [new_leaf(v[name]) for v in self._values]
            if not self._derivatives[place].is_sharded:
                leaves = leaves[:1] * len(leaves)
            for of_rank, leaf in zip(self._values, leaves, strict=True):
                of_rank[name] = leaf
        self._leaves[place] = [v[name] for v in self._values]

    def results(self, observables: Sequence[Placement]) -> list[tuple[str, Tensor]]:
        """Returns observables and derivatives, each with its name, from which :meth:`gradients` are computed.

        Args:
            observables: placements of the observables.
        """
        energies = [self._values[0][n] for n in self._program.energies]
        inputs = [x for leaves in self._leaves for x in dict.fromkeys(leaves)]
        roots = [e.sum() for e in energies if e.requires_grad]
        with torch.enable_grad(), autocast_as(self._program.autocast):
            found = iter(
                torch.autograd.grad(roots, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
            )
        outputs = []
        for name, placement in zip(self._captured.regions.observables, observables, strict=True):
            outputs.append((f"output {name}", self._gathered([v[name] for v in self._values], placement)))
        for name, leaves, placement in zip(self._program.coordinates, self._leaves, self._derivatives, strict=True):
            gradients = [next(found) for _ in dict.fromkeys(leaves)]
            if not placement.is_sharded:  # each rank computes with a copy of its own
                gradients = [torch.stack(gradients).sum(0)]
            outputs.append((f"{DERIVATIVE}{name}", self._gathered(gradients, placement)))
        self._loss = probe_loss([x for _, x in outputs])
        return [(name, x.detach()) for name, x in outputs]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[tuple[str, Tensor]]:
        """Returns the gradients of a force loss by those of the parameters that the program reads, with their names."""
        chosen = set(parameters)
        read = {n: p for n, p in self._parameters.items() if p in chosen}
        if not read:
            return []
        given = self._loss, list(read.values())
        found = torch.autograd.grad(*given, retain_graph=True, allow_unused=True, materialize_grads=True)
        return [(f"{GRADIENT}{n!r}", g) for n, g in zip(read, found, strict=True)]

    def _gathered(self, of_ranks: Sequence[Tensor], placement: Placement) -> Tensor:
        if not placement.is_sharded:
            return of_ranks[0]
        rows = _all_rows([x.movedim(placement.dim, 0) for x in of_ranks], self._shards[placement.rows])
        return rows.movedim(0, placement.dim)


# The exchanges, of all ranks at once: from each rank's value, with its rows first, to each rank's result.


def _all_rows(values: Sequence[Tensor], shards: Sequence[Shard]) -> Tensor:
    return torch.cat(list(values))[shards[0].order.to(values[0].device)]


def _held(shard: Shard, device: torch.device) -> Tensor:
    """Returns the global indices of the rows that a rank holds, own rows and halo."""
    return torch.cat([shard.own, shard.halo]).to(device)


def _gather_halo(values: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    everything = _all_rows(values, shards)
    return [torch.cat([x, everything[s.halo.to(x.device)]]) for x, s in zip(values, shards, strict=True)]


def _sum_halo(values: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    total = values[0].new_zeros(shards[0].num_rows, *values[0].shape[1:])
    for value, shard in zip(values, shards, strict=True):
        total = total.index_add(0, _held(shard, value.device), value)
    return [total[s.own.to(total.device)] for s in shards]


def _max_halo(values: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    largest = values[0].new_full((shards[0].num_rows, *values[0].shape[1:]), -math.inf)
    for value, shard in zip(values, shards, strict=True):
        rows = _held(shard, value.device)
        largest[rows] = torch.maximum(largest[rows], value.detach())
    of_rank = [largest[_held(s, largest.device)] for s in shards]
    are_largest = [v.detach() == g for v, g in zip(values, of_rank, strict=True)]
    counts = _sum_halo([a.to(v.dtype) for a, v in zip(are_largest, values, strict=True)], shards)
    kept = [torch.where(a, v, torch.zeros_like(v)) for a, v in zip(are_largest, values, strict=True)]
    return [s / n for s, n in zip(_sum_halo(kept, shards), counts, strict=True)]


def _with_rows_of(fill: float, values: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    return [torch.cat([x, x.new_full((s.num_halo, *x.shape[1:]), fill)]) for x, s in zip(values, shards, strict=True)]


def _sum(values: Sequence[Tensor], _: Sequence[Shard]) -> list[Tensor]:
    return [functools.reduce(operator.add, values)] * len(values)


def _same(values: Sequence[Tensor], _: Sequence[Shard]) -> list[Tensor]:
    return list(values)


_EXCHANGES: dict[Any, Callable[[Sequence[Tensor], Sequence[Shard]], list[Tensor]]] = {
    exchange_ops.gather_halo: _gather_halo,
    exchange_ops.sum_halo: _sum_halo,
    exchange_ops.with_room: functools.partial(_with_rows_of, 0.0),
    exchange_ops.max_halo: _max_halo,
    exchange_ops.with_low_room: functools.partial(_with_rows_of, -math.inf),
    exchange_ops.sum_over_ranks: _sum,
    exchange_ops.replicate: _same,
    exchange_ops.count_once: _same,
}
