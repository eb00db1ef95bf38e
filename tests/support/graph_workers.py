"""What graph ranks do in the tests of their exchanges: run with ``RankPool.run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy import CHAINS, FLOAT, ToyStage, chain, double_backward, loss_gradients, microbatch

from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import StageOutput
from lightning_januspipe.graph import collectives, make_shards, rows_read
from lightning_januspipe.graph.collectives import Exchange

NUM_FEATURES, NUM_ATOMS = 3, 7
SHARDINGS = ("mixed", "one rank has nothing", "one reads, none is read", "free")


def start() -> tuple[int, int, dist.ProcessGroup]:
    """(rank, number of ranks, a group of all that is not the default one)."""
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=timedelta(seconds=60))


@dataclass(frozen=True)
class ShardedGraph:
    """Atoms and edges of a small graph over the ranks, as one of them sees them.

    Attributes:
        atoms: exchange of atoms.
        edges: exchange of edges.
        owner: (N,) of atoms.
        target: (E,) targets of all edges.
        source: (E,) sources of all edges.
        local_target: of own edges, local numbers of atoms.
        local_source: of own edges, local numbers of atoms, halo included.
    """

    atoms: Exchange
    edges: Exchange
    owner: Tensor
    target: Tensor
    source: Tensor
    local_target: Tensor
    local_source: Tensor


def sharded_graph(kind: str, rank: int, num_ranks: int, group: dist.ProcessGroup) -> ShardedGraph:
    """Returns a graph of :data:`NUM_ATOMS` atoms, sharded in one of the ways in :data:`SHARDINGS`."""
    generator = torch.Generator().manual_seed(3)
    num = NUM_ATOMS
    owner = (torch.arange(num) * 5) % num_ranks
    target, source = torch.randint(num, (2, 4 * num), generator=generator)
    if kind == "one rank has nothing":
        owner = owner % (num_ranks - 1)
    if kind == "one reads, none is read":
        inside = (owner[target] == owner[source]) | ((owner[target] == 0) & (owner[source] == 1))
        target, source = target[inside], source[inside]
    if kind == "free":
        inside = owner[target] == owner[source]
        target, source = target[inside], source[inside]
    return _sharded_graph(owner, target, source, rank, num_ranks, group)


def _sharded_graph(
    owner: Tensor, target: Tensor, source: Tensor, rank: int, num_ranks: int, group: dist.ProcessGroup
) -> ShardedGraph:
    of_edges = owner[target]
    atoms = make_shards(owner, rows_read(source, of_edges, len(owner), num_ranks), num_ranks)[rank]
    edges = make_shards(of_edges, [torch.empty(0, dtype=torch.int64)] * num_ranks, num_ranks)[rank]
    assert edges.is_free
    local = atoms.local(target[edges.own]), atoms.local(source[edges.own])
    return ShardedGraph(Exchange(atoms, group), Exchange(edges, group), owner, target, source, *local)


def message_passing_weights() -> dict[str, nn.Parameter]:
    """Returns weights of :func:`energy`, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embedding": (2, NUM_FEATURES), "readout": (NUM_FEATURES,), "whole": (NUM_FEATURES,)}
    shapes |= {f"{kind}{i}": (NUM_FEATURES, NUM_FEATURES) for kind in ("message", "update") for i in range(2)}
    return {k: nn.Parameter(torch.randn(*s, generator=generator, dtype=FLOAT) * 0.6) for k, s in shapes.items()}


def energy(
    weights: dict[str, nn.Parameter],
    positions: Tensor,
    species: Tensor,
    target: Tensor,
    source: Tensor,
    atoms: Exchange | None,
) -> Tensor:
    """Returns the energy of two layers of messages and a readout of the whole, in one process or over all ranks.

    Args:
        weights: parameters.
        positions: (n_own + n_halo, 3).
        species: (n_own,).
        target: (e_own,) local numbers.
        source: (e_own,) local numbers.
        atoms: None in one process.
    """

    def gathered(x: Tensor) -> Tensor:
        return x if atoms is None else collectives.gather_halo(x, atoms)

    h = weights["embedding"][species]
    vectors = positions[source] - positions[target]
    decay = torch.exp(-0.5 * vectors.square().sum(-1, keepdim=True))
    for layer in range(2):
        extended = gathered(h.square() + h @ weights[f"message{layer}"])
        if layer == 0:
            summed = torch.zeros_like(h).index_add(0, target, decay * extended[source])
        else:  # into the sources of edges, of which some belong to others
            summed = torch.zeros_like(extended).index_add(0, source, decay * extended[target])
            summed = summed if atoms is None else collectives.sum_halo(summed, atoms)
        h = h + torch.tanh(summed) @ weights[f"update{layer}"]
    of_atoms = torch.tanh(h * weights["readout"]).sum()
    whole, readout = h.square().sum(0), weights["whole"]
    if atoms is not None:
        of_atoms, whole = collectives.sum_over_ranks(of_atoms, atoms), collectives.sum_over_ranks(whole, atoms)
        readout = collectives.count_once(readout, atoms)
    return of_atoms + torch.tanh(0.1 * whole * readout).sum()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference over the largest expected entry."""
    assert expected.abs().max() > 1e-3, "a zero proves nothing"
    return float((found - expected).abs().max() / expected.abs().max())


# -- values of each operation ------------------------------------------------------------------------------------------


def values(kind: str) -> list[str]:
    """Compares operations on tensors of all dtypes and layouts with whole tensors; returns what differs."""
    rank, num_ranks, group = start()
    sharded = sharded_graph(kind, rank, num_ranks, group)
    exchange, shard = sharded.atoms, sharded.atoms.shard
    rows = torch.cat([shard.own, shard.halo])
    wrong = []

    def check(what: str, found: Tensor, expected: Tensor) -> None:
        same = found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)
        wrong.extend([] if same else [f"rank {rank}: {what}"])

    def of(owner_rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(owner_rank)
        numbers = torch.randint(-4, 5, shape, generator=generator) if dtype != torch.uint8 else torch.ones(shape)
        return (numbers * (1 + 2j) if dtype.is_complex else numbers).to(dtype)

    integers = (torch.int64, torch.int32, torch.uint8)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128)
    for dtype in (*floats, *integers, torch.bool):
        for shape in ((), (3,), (2, 3), (0,), (2, 0)):
            everything = of(99, (NUM_ATOMS, *shape), dtype)
            what = f"{dtype} {shape}"
            check(f"gather_halo {what}", collectives.gather_halo(everything[shard.own], exchange), everything[rows])
            check(f"collect_rows {what}", collectives.collect_rows(everything[shard.own], exchange), everything)
            if dtype is torch.bool:
                continue
            # What rank r holds for each atom, if it is there: everyone knows it, so everyone knows the sum.
            shards = make_shards(sharded.owner, _needed(sharded, num_ranks), num_ranks)
            held = [of(r, (s.num_own + s.num_halo, *shape), dtype) for r, s in enumerate(shards)]
            total = torch.zeros((NUM_ATOMS, *shape), dtype=dtype)
            for s, h in zip(shards, held, strict=True):
                total.index_add_(0, torch.cat([s.own, s.halo]), h)
            check(f"sum_halo {what}", collectives.sum_halo(held[rank], exchange), total[shard.own])
            summands = [of(r, shape, dtype) for r in range(num_ranks)]
            check(f"sum {what}", collectives.sum_over_ranks(summands[rank], exchange), sum(summands[1:], summands[0]))
    few = torch.full((8,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    exact = torch.full((8,), 256.0 + num_ranks - 1).to(torch.bfloat16)
    check("sum of halves in float32", collectives.sum_over_ranks(few, exchange), exact)
    base = of(98, (5, 3, NUM_ATOMS), torch.float64)
    complexes = of(97, (NUM_ATOMS, 2), torch.complex128)
    for what, everything, own in [
        ("transposed", base.movedim(2, 0), base[:, :, shard.own].movedim(2, 0)),
        ("strided", base.movedim(2, 0)[:, ::2], base.movedim(2, 0)[shard.own][:, ::2]),
        ("conjugate", complexes.conj(), complexes[shard.own].conj()),
        ("expanded", torch.ones(NUM_ATOMS, 4), torch.ones(1, 1).expand(shard.num_own, 4)),
    ]:
        extended = collectives.gather_halo(own, exchange)
        check(f"gather_halo {what}", extended, everything[rows])
        check(f"collect_rows {what}", collectives.collect_rows(own, exchange), everything.clone())
        flipped = extended.flip(1).flip(1) if what != "conjugate" else extended.conj().resolve_conj().conj()
        expected = collectives.sum_halo(extended.contiguous(), exchange)
        check(f"sum_halo {what}", collectives.sum_halo(flipped, exchange), expected)
        check(
            f"sum {what}",
            collectives.sum_over_ranks(own[:0].sum(0) + rank, exchange),
            own[:0].sum(0) + total_of(num_ranks),
        )
    return wrong


def total_of(num_ranks: int) -> int:
    """Sums the numbers of all ranks."""
    return num_ranks * (num_ranks - 1) // 2


def _needed(sharded: ShardedGraph, num_ranks: int) -> list[Tensor]:
    return rows_read(sharded.source, sharded.owner[sharded.target], NUM_ATOMS, num_ranks)


def same_bits() -> tuple[Tensor, Tensor]:
    """Returns a float32 sum over the ranks, and rows summed from halos twice."""
    rank, num_ranks, group = start()
    exchange = sharded_graph("mixed", rank, num_ranks, group).atoms
    generator = torch.Generator().manual_seed(rank)
    total = collectives.sum_over_ranks(torch.randn(1000, generator=generator), exchange)
    held = torch.randn(exchange.shard.num_own + exchange.shard.num_halo, 5, generator=generator)
    first, second = (collectives.sum_halo(held, exchange) for _ in range(2))
    assert torch.equal(first, second)
    return total, torch.ones(())


def refusals() -> list[str]:
    """Returns the messages of what is refused, on every rank before anything is sent."""
    rank, num_ranks, group = start()
    exchange = sharded_graph("mixed", rank, num_ranks, group).atoms
    shard = exchange.shard
    calls: list[Callable[[], Any]] = [
        lambda: collectives.gather_halo(torch.ones(shard.num_own + 1), exchange),
        lambda: collectives.sum_halo(torch.ones(shard.num_own), exchange),
        lambda: collectives.collect_rows(torch.ones(()), exchange),
        lambda: Exchange(shard, None),
        lambda: Exchange(replace(shard, rank=(rank + 1) % num_ranks), group),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


# -- messages ----------------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the collectives of this rank."""
    counts = {"all_to_all_single": 0, "all_reduce": 0, "all_gather": 0}

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*args: Any, **more: Any) -> Any:
            counts[name] += 1
            return function(*args, **more)

        return call

    with ExitStack() as stack:
        for name in counts:
            stack.enter_context(patch.object(dist, name, counting(name)))
        yield counts


def messages(kind: str) -> dict[str, int]:
    """Returns the collectives of the energy, its forces and the gradient of a force loss."""
    rank, num_ranks, group = start()
    sharded = sharded_graph(kind, rank, num_ranks, group)
    shard = sharded.atoms.shard
    with counted() as counts:
        leaf = torch.rand(shard.num_own, 3, dtype=FLOAT).requires_grad_()
        weights = message_passing_weights()
        species = torch.zeros(shard.num_own, dtype=torch.int64)
        positions = collectives.gather_halo(leaf, sharded.atoms)
        value = energy(weights, positions, species, sharded.local_target, sharded.local_source, sharded.atoms)
        (forces,) = torch.autograd.grad(value, leaf, create_graph=True)
        torch.autograd.grad(forces.square().sum(), list(weights.values()))
    return counts


def with_a_part_that_needs_no_gradient() -> list[tuple[bool, bool]]:
    """Runs with inputs that need no gradient, and with gradients that nothing defines; returns (no graph, finished)."""
    rank, num_ranks, group = start()
    exchange = sharded_graph("mixed", rank, num_ranks, group).atoms
    num = exchange.shard.num_own
    plain = collectives.gather_halo(torch.ones(num, 2), exchange)
    with torch.no_grad():
        silent = collectives.gather_halo(torch.ones(num, 2, requires_grad=True), exchange)
    x, other = torch.ones(num, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    extended = collectives.gather_halo(x, exchange)
    with counted() as counts:
        unused = torch.autograd.grad((extended.detach() * other).sum(), [x, other], allow_unused=True)
        held_back = extended * 1.0
        held_back.register_hook(lambda g: g * 0)
        (zeros,) = torch.autograd.grad(held_back.sum(), x)
    return [
        (not plain.requires_grad, True),
        (not silent.requires_grad, True),
        (unused[0] is None, unused[1] is not None),
        (bool((zeros == 0).all()), counts["all_to_all_single"] == 1),
    ]


# -- phases ------------------------------------------------------------------------------------------------------------


class ShardedStage(ToyStage):
    """A stage of :mod:`toy` on own rows; the tensors are those of this rank, with local numbers of atoms."""

    exchange: Exchange

    def forward(self, coordinates: list[Tensor], tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Computes what the stage does without graph ranks, with exchanges."""
        layout, weights, atoms = self.layout, self.weights, self.exchange
        assert not layout.vectors and not layout.species
        positions, strain = coordinates
        _, species, (source, target), structure, _ = tensors
        h = boundary[0] if self.index else weights["embedding"][species]
        message = (h + 0.1 * h.square()) @ weights["message"]
        if layout.geometry:
            of_atoms = collectives.replicate(strain, atoms)[structure]
            strained = collectives.gather_halo(positions + (positions[:, None, :] * of_atoms).sum(-1), atoms)
            vectors = strained[source] - strained[target]
            decay = torch.exp(-0.5 * vectors.square().sum(-1))
            extended = collectives.gather_halo(message, atoms)
            message = torch.zeros_like(h).index_add(0, target, decay[:, None] * extended[source])
        h = h + torch.tanh(message) @ weights["update"]
        energies, observables = [], []
        if layout.energy:
            of_atoms = torch.tanh(h * weights["energy"]).sum(-1)
            parts = h.new_zeros(strain.shape[0]).index_add(0, structure, of_atoms)
            observables.append(collectives.sum_over_ranks(parts, atoms))
            energies.append(of_atoms.sum())
        if layout.charges:
            observables.append((h * weights["charges"]).sum(-1))
        return StageOutput([h] if self.boundary_out else [], energies, observables, coordinates)


def phases(name: str, defer: bool) -> tuple[float, dict[str, int]]:
    """Runs a chain on owned rows through all phases; returns the largest error, and the number of collectives."""
    rank, num_ranks, group = start()
    functions, spec = chain(CHAINS[name])
    positions, species, edges, structure, strain = microbatch(1).tensors
    expected = double_backward(functions, [positions, species, edges, structure, strain])
    owner = torch.arange(len(positions)) % num_ranks
    source, target = edges
    sharded = _sharded_graph(owner, target, source, rank, num_ranks, group)
    own = sharded.atoms.shard.own
    local = torch.stack([sharded.local_source, sharded.local_target])
    tensors = [positions[own], species[own], local, structure[own], strain]
    for function in functions:
        function.__class__ = ShardedStage
        function.exchange = sharded.atoms  # type: ignore[attr-defined]
    with counted() as counts:
        result = run_single_process(functions, spec, tensors, loss_gradients, defer=defer)
    errors = []
    for found, wanted in zip(
        [*result.observables, *result.derivatives], [*expected.observables, *expected.derivatives], strict=True
    ):
        has_rows = wanted.shape[0] == len(positions)
        errors.append(relative_error(collectives.collect_rows(found, sharded.atoms) if has_rows else found, wanted))
    for parameter, wanted in expected.gradients.items():
        gradient = result.gradients.get(parameter)
        assert gradient is not None
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        errors.append(relative_error(gradient, wanted))
    return max(errors), counts
