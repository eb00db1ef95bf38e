"""Derivatives of the exchanges between graph ranks, right and wrong ones: run with ``RankPool.run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from graph_workers import NUM_ATOMS, ShardedGraph, energy, message_passing_weights, relative_error, sharded_graph, start
from torch import Tensor
from toy import FLOAT

from lightning_januspipe.graph import collectives
from lightning_januspipe.graph.collectives import Exchange


@dataclass
class Errors:
    """Largest differences from the function in one process, relative to the largest entry."""

    energy: float
    forces: float
    gradients: float

    @classmethod
    def of(cls, found: Sequence[Any], expected: Sequence[Any]) -> Errors:
        """Compares (energy, forces, gradients)."""
        gradients = [relative_error(a, b) for a, b in zip(found[2], expected[2], strict=True)]
        return cls(relative_error(found[0], expected[0]), relative_error(found[1], expected[1]), max(gradients))


def force_loss(kind: str, replicated_positions: bool) -> Errors:
    """Compares energy, forces, and the parameter gradients of a loss of both with those of one rank."""
    rank, num_ranks, group = start()
    return _force_loss(sharded_graph(kind, rank, num_ranks, group), group, replicated_positions)


def _force_loss(sharded: ShardedGraph, group: dist.ProcessGroup, replicated_positions: bool) -> Errors:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(NUM_ATOMS, 3, generator=generator, dtype=FLOAT)
    species = torch.randint(2, (NUM_ATOMS,), generator=generator)
    weights = message_passing_weights()
    names = list(weights)

    leaf = points.clone().requires_grad_()
    value = energy(weights, leaf, species, sharded.target, sharded.source, None)
    (forces,) = torch.autograd.grad(value, leaf, create_graph=True)
    loss = (value - 0.3).square() + (forces - 0.1).square().sum()
    expected = value.detach(), forces.detach(), torch.autograd.grad(loss, [weights[n] for n in names])

    exchange, shard = sharded.atoms, sharded.atoms.shard
    if replicated_positions:
        leaf = points.clone().requires_grad_()
        positions = collectives.replicate(leaf, exchange)[torch.cat([shard.own, shard.halo])]
    else:
        leaf = points[shard.own].requires_grad_()
        positions = collectives.gather_halo(leaf, exchange)
    value = energy(weights, positions, species[shard.own], sharded.local_target, sharded.local_source, exchange)
    (forces,) = torch.autograd.grad(value, leaf, create_graph=True)
    of_forces = (forces - 0.1).square().sum()
    loss = (value - 0.3).square() + (
        of_forces if replicated_positions else collectives.sum_over_ranks(of_forces, exchange)
    )
    gradients = torch.autograd.grad(loss, [weights[n] for n in names])
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    found = forces.detach() if replicated_positions else collectives.collect_rows(forces, exchange)
    return Errors.of((value.detach(), found, gradients), expected)


def checked_functions(sharded: ShardedGraph) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Functions of a replicated input with a replicated result, in which one operation takes part, and their inputs.

    As all ranks have the same input, they evaluate numerical derivatives in step.
    """
    exchange, shard = sharded.atoms, sharded.atoms.shard
    generator = torch.Generator().manual_seed(5)
    rows = torch.cat([shard.own, shard.halo])
    factors = torch.rand(NUM_ATOMS + exchange.shard.num_ranks, 1, generator=generator, dtype=FLOAT) + 0.5
    of_rank = factors[NUM_ATOMS + shard.rank]

    def summed(own: Tensor, at: Tensor) -> Tensor:
        return collectives.sum_over_ranks((torch.sin(own) * factors[at] * of_rank).sum(0), exchange)

    def gather_halo(x: Tensor) -> Tensor:
        own = collectives.replicate(x, exchange)[shard.own]
        return summed(collectives.gather_halo(own.sin(), exchange), rows)

    def sum_halo(x: Tensor) -> Tensor:
        held = collectives.replicate(x, exchange)[rows]
        return summed(collectives.sum_halo(held.sin() * of_rank, exchange), shard.own)

    def sum_over_ranks(x: Tensor) -> Tensor:
        part = collectives.replicate(x.sin(), exchange) * of_rank
        return collectives.sum_over_ranks(part.square(), exchange).sin()

    def count_once(x: Tensor) -> Tensor:
        # As the sum of parameter gradients at the end of a step does, the derivative of ``replicate`` sums.
        return collectives.count_once(collectives.replicate(x, exchange), exchange).sin()

    all_rows = torch.rand(NUM_ATOMS, 1, generator=generator, dtype=FLOAT).requires_grad_()
    few = all_rows.detach()[:2].clone().requires_grad_()
    return {
        "gather_halo": (gather_halo, all_rows),
        "sum_halo": (sum_halo, all_rows),
        "sum_over_ranks": (sum_over_ranks, few),
        "count_once": (count_once, few),
    }


def numerical_derivatives(kind: str) -> None:
    """First and second derivatives of each operation against numerical ones, by torch's own checks."""
    rank, num_ranks, group = start()
    for function, x in checked_functions(sharded_graph(kind, rank, num_ranks, group)).values():
        torch.manual_seed(0)  # gradgradcheck draws cotangents, which have to be the same on all ranks
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def _differing(sharded: ShardedGraph) -> list[str]:
    """Returns the operations whose first or second derivative differs from the numerical one on any rank.

    Torch's checks end on one rank at the first difference, while the others go on: here all are evaluated.
    """
    wrong = []
    for name, (function, x) in checked_functions(sharded).items():

        def gradient(x: Tensor, of: Tensor, function: Any = function) -> Tensor:
            with torch.enable_grad():
                value = function(x := x if x.requires_grad else x.clone().requires_grad_())
                return torch.autograd.grad(value, x, of, create_graph=True)[0]

        value = function(x).detach()
        of = torch.linspace(0.5, 1.5, value.numel(), dtype=FLOAT).view_as(value)
        errors = [_jacobian_error(function, x), _jacobian_error(lambda x, of=of: gradient(x, of), x)]
        errors.append(_jacobian_error(lambda of, x=x: gradient(x, of), of.requires_grad_()))
        found = torch.tensor(max(errors))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=sharded.atoms.group)
        wrong.extend([name] * bool(found > 1e-6))
    return wrong


def _jacobian_error(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> float:
    value = function(x)
    rows = []
    for i in range(value.numel()):
        has_graph = value.requires_grad
        row = torch.autograd.grad(value.view(-1)[i], x, retain_graph=True, allow_unused=True)[0] if has_graph else None
        rows.append(torch.zeros_like(x) if row is None else row)
    columns = []
    for i in range(x.numel()):
        there, back = x.detach().clone(), x.detach().clone()
        there.view(-1)[i] += step
        back.view(-1)[i] -= step
        columns.append((function(there) - function(back)).detach().view(-1) / (2 * step))
    return float((torch.stack(rows).view(value.numel(), -1) - torch.stack(columns, 1)).abs().max())


def third_derivative() -> tuple[Tensor, Tensor]:
    """Returns derivatives of the energy along a line of positions: from all ranks, and in one process."""
    rank, num_ranks, group = start()
    sharded = sharded_graph("mixed", rank, num_ranks, group)
    exchange, shard = sharded.atoms, sharded.atoms.shard
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(NUM_ATOMS, 3, generator=generator, dtype=FLOAT)
    species = torch.randint(2, (NUM_ATOMS,), generator=generator)
    weights, rows = message_passing_weights(), torch.cat([shard.own, shard.halo])

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = points.clone().requires_grad_()
        value = function(x)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * points.cos()).sum()
        return value.detach()

    def whole(x: Tensor) -> Tensor:
        return energy(weights, x, species, sharded.target, sharded.source, None)

    def shared(x: Tensor) -> Tensor:
        positions = collectives.replicate(x, exchange)[rows]
        return energy(weights, positions, species[shard.own], sharded.local_target, sharded.local_source, exchange)

    return third(shared), third(whole)


# -- faults ------------------------------------------------------------------------------------------------------------

Backward = Callable[..., tuple[Tensor | None, None]]


def _backward(function: Callable[[Tensor, Exchange], Tensor]) -> Backward:
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return None if gradients[0] is None else function(gradients[0], ctx.exchange), None

    return backward


FAULTS: dict[str, tuple[str, Callable[[Tensor, Exchange], Tensor]]] = {
    "none": ("_GatherHalo", collectives.sum_halo),
    "gather_halo: a raw exchange behind it": ("_GatherHalo", lambda g, e: collectives.sum_halo(g.detach(), e)),
    "gather_halo: G times too much": ("_GatherHalo", lambda g, e: collectives.sum_halo(g, e) * e.shard.num_ranks),
    "gather_halo: gradients of the halo lost": ("_GatherHalo", lambda g, e: g[: e.shard.num_own]),
    "sum_halo: a raw exchange behind it": ("_SumHalo", lambda g, e: collectives.gather_halo(g.detach(), e)),
    "sum_halo: zeros for the halo": (
        "_SumHalo",
        lambda g, e: torch.cat([g, g.new_zeros(e.shard.num_halo, *g.shape[1:])]),
    ),
    "sum_over_ranks: an all-reduce behind it": ("_SumOverRanks", collectives.sum_over_ranks),
    "sum_over_ranks: a raw copy behind it": ("_SumOverRanks", lambda g, e: g.detach().clone()),
    "replicate: no all-reduce behind it": ("_Replicate", lambda g, e: g),
    "replicate: a raw all-reduce behind it": ("_Replicate", lambda g, e: collectives.sum_over_ranks(g.detach(), e)),
    "count_once: counted by all": ("_CountOnce", lambda g, e: g),
    "count_once: counted by none": ("_CountOnce", lambda g, e: g * 0),
}
"""Derivatives that are wrong: of which operation, and what is computed instead."""


def under_faults() -> dict[str, tuple[Errors, Errors, list[str]]]:
    """Returns errors of the force loss for owned and for replicated positions, and what numerical derivatives find."""
    rank, num_ranks, group = start()
    sharded = sharded_graph("mixed", rank, num_ranks, group)
    found = {}
    for name, (function, instead) in FAULTS.items():
        with patch.object(getattr(collectives, function), "backward", staticmethod(_backward(instead))):
            errors = [_force_loss(sharded, group, replicated) for replicated in (False, True)]
            found[name] = errors[0], errors[1], _differing(sharded)
    return found
