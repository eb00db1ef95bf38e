"""Partitions: every atom on one rank, equal work, structures whole where that balances, and a small halo."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_januspipe.graph import halo_size, make_shards, partition_atoms, rows_read
from lightning_januspipe.graph import partition as partition_module
from lightning_januspipe.graph.partition import MAX_IMBALANCE
from lightning_januspipe.loader.packing import ATOM_WEIGHT

CELL = 10.0


def weights(target: Tensor, num_atoms: int) -> Tensor:
    return ATOM_WEIGHT + torch.bincount(target, minlength=num_atoms).double()


def lattice(num: tuple[int, int, int], cutoff: float = 2.0, drift: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(target, source, positions) of atoms near the points of a periodic grid of unit spacing; drift in cells."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, num), indexing="ij"), -1).reshape(-1, 3).astype(float)
    points = grid + generator.uniform(-0.3, 0.3, grid.shape)
    box = np.array(num, dtype=float)
    vectors = points[None] - points[:, None]
    vectors -= box * np.round(vectors / box)
    target, source = np.nonzero((np.linalg.norm(vectors, axis=-1) < cutoff) & ~np.eye(len(points), dtype=bool))
    points += drift * box * generator.integers(-1, 2, points.shape)
    return torch.from_numpy(target), torch.from_numpy(source), torch.from_numpy(points)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    num_atoms = draw(st.integers(1, 20))
    atoms = st.integers(0, num_atoms - 1)
    edges = draw(st.lists(st.tuples(atoms, atoms), max_size=60))
    target, source = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).unbind(1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return target, source, torch.rand(num_atoms, 3, generator=generator), draw(st.integers(1, 6))


@settings(deadline=None, max_examples=200)
@given(graphs(), st.sampled_from(["spatial", "index", "no positions", "structures"]))
def test_every_atom_has_one_owner_and_work_is_equal(graph: tuple[Tensor, Tensor, Tensor, int], way: str) -> None:
    target, source, positions, num_ranks = graph
    num_atoms = len(positions)
    more = {"structure": torch.arange(num_atoms) // 3} if way == "structures" else {}
    order = "index" if way == "index" else "spatial"
    points = None if way == "no positions" else positions
    owner = partition_atoms(target, source, num_atoms, num_ranks, points, order=order, **more)  # type: ignore[arg-type]
    again = partition_atoms(target, source, num_atoms, num_ranks, points, order=order, **more)  # type: ignore[arg-type]
    assert owner.shape == (num_atoms,) and owner.dtype == torch.int64 and torch.equal(owner, again)
    assert owner.min() >= 0 and owner.max() < num_ranks
    weight = weights(target, num_atoms)
    loads = torch.bincount(owner, weight, minlength=num_ranks)
    mean = weight.sum() / num_ranks
    assert ((loads - mean).abs() <= weight.max() + 1e-9).all() or loads.max() <= MAX_IMBALANCE * mean + 1e-9
    # The halo is what shards make of the edges.
    of_edges = owner[target]
    shards = make_shards(owner, rows_read(source, of_edges, num_atoms, num_ranks), num_ranks)
    assert halo_size(owner, target, source, num_ranks) == sum(s.num_halo for s in shards)
    for shard in shards:
        shard.local(source[of_edges == shard.rank])  # everything that the rank's edges read is there
        assert set(target[of_edges == shard.rank].tolist()) <= set(shard.own.tolist())


@pytest.mark.parametrize("given_structure", [False, True])
@pytest.mark.parametrize("without_scipy", [False, True])
def test_many_structures_are_dealt_whole(
    given_structure: bool, without_scipy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_scipy:
        monkeypatch.setattr(partition_module.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    sizes = [5, 9, 7, 3, 8, 5, 6, 7, 4, 9, 5, 6, 7, 8, 3, 4, 5, 6]
    structure = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shuffled = structure[torch.randperm(len(structure), generator=torch.Generator().manual_seed(0))]
    target, source = (shuffled[:, None] == shuffled).nonzero().unbind(1)
    owner = partition_atoms(
        target, source, len(shuffled), 3, torch.rand(len(shuffled), 3), structure=shuffled if given_structure else None
    )
    for number in range(len(sizes)):
        assert len(owner[shuffled == number].unique()) == 1, "a structure is cut"
    assert halo_size(owner, target, source, 3) == 0
    loads = torch.bincount(owner, weights(target, len(owner)))
    assert loads.max() / loads.mean() <= MAX_IMBALANCE


@pytest.mark.parametrize("with_positions", [False, True])
def test_of_few_structures_few_are_cut(with_positions: bool) -> None:
    target, source, positions = lattice((6, 6, 12), cutoff=1.5)
    num = len(positions)
    # Neither the order of the atoms nor where they are tells the structures apart.
    place = torch.randperm(3 * num, generator=torch.Generator().manual_seed(0))
    three = [place[torch.cat([t + i * num for i in range(3)])] for t in (target, source)]
    structure, points = torch.empty(3 * num, dtype=torch.int64), torch.empty(3 * num, 3, dtype=torch.float64)
    structure[place], points[place] = torch.arange(3 * num) // num, positions.repeat(3, 1)
    owner = partition_atoms(*three, 3 * num, 2, points if with_positions else None, structure=structure)
    assert [len(owner[structure == i].unique()) for i in range(3)].count(2) == 1, "more than one is cut"
    alone = halo_size(partition_atoms(target, source, num, 2, positions), target, source, 2)
    assert 0 < halo_size(owner, *three, 2) <= (1.1 if with_positions else 1.5) * alone


def test_a_long_cell_is_cut_into_slabs() -> None:
    target, source, positions = lattice((4, 24, 4), cutoff=1.5)
    owner = partition_atoms(target, source, len(positions), 4, positions)
    # Slabs have two faces of 16 atoms each.
    assert halo_size(owner, target, source, 4) <= 4 * 2 * 16 * 1.6
    by_index = partition_atoms(target, source, len(positions), 4, order="index")
    assert halo_size(owner, target, source, 4) < 0.5 * halo_size(by_index, target, source, 4)


def test_a_free_cluster_is_cut_into_blocks() -> None:
    """Without periodic images four slabs have six faces, and four columns have four."""
    target, source, positions = lattice((12, 12, 12), cutoff=1.5)
    inside = (positions[target] - positions[source]).norm(dim=1) < 1.5
    target, source = target[inside], source[inside]
    owner = partition_atoms(target, source, len(positions), 4, positions)
    slabs = np.array_split(np.argsort(positions[:, 0].numpy()), 4)
    as_slabs = torch.empty_like(owner)
    for rank, atoms in enumerate(slabs):
        as_slabs[atoms] = rank
    assert halo_size(owner, target, source, 4) < 0.8 * halo_size(as_slabs, target, source, 4)


def test_the_cell_folds_what_has_drifted() -> None:
    target, source, positions = lattice((4, 16, 4), cutoff=1.5, drift=1)
    num, cell = len(positions), torch.diag(torch.tensor([4.0, 16.0, 4.0]))
    lost = halo_size(partition_atoms(target, source, num, 4, positions), target, source, 4)
    owner = partition_atoms(target, source, num, 4, positions, cell=cell)
    assert halo_size(owner, target, source, 4) < 0.7 * lost
    batched = partition_atoms(
        target, source, num, 4, positions, cell=cell[None], structure=torch.zeros(num, dtype=torch.int64)
    )
    assert torch.equal(owner, batched)
    free = partition_atoms(target, source, num, 4, positions, cell=torch.zeros(3, 3))
    assert halo_size(free, target, source, 4) == lost, "a cell without a volume folds nothing"


@pytest.mark.parametrize("num_atoms", [0, 1, 2, 3])
def test_more_ranks_than_atoms(num_atoms: int) -> None:
    none = torch.empty(0, dtype=torch.int64)
    for positions in (None, torch.rand(num_atoms, 3)):
        for order in ("spatial", "index"):
            owner = partition_atoms(none, none, num_atoms, 4, positions, order=order)  # type: ignore[arg-type]
            assert len(owner) == num_atoms and len(owner.unique()) == num_atoms, "no rank has two"
    ring = torch.arange(num_atoms)
    owner = partition_atoms(ring, ring.roll(1), num_atoms, 4, torch.rand(num_atoms, 3))
    assert len(owner.unique()) == num_atoms


def test_a_large_cell_is_sharded_fast() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(5000).repeat_interleave(60)
    source = (target + torch.randint(-300, 300, target.shape, generator=generator)) % 5000
    positions = torch.rand(5000, 3, generator=generator)
    partition_atoms(target, source, 5000, 4, positions)
    start = time.process_time()
    partition_atoms(target, source, 5000, 4, positions)
    assert time.process_time() - start < 0.5, "a tenth of a second is usual"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "random"}, "order='random'"),
        ({"num_ranks": 0}, "num_ranks=0"),
        ({"edge_target": torch.tensor([0, 3])}, "atoms of edges are from 0 to 3; expected an index below 3"),
        ({"edge_source": torch.tensor([0])}, "2 targets and 1 sources"),
        ({"edge_source": torch.tensor([[0, 1]])}, r"of shape \(1, 2\)"),
        ({"positions": torch.zeros(2, 3)}, r"positions have shape \(2, 3\); expected \(3, 3\)"),
        ({"structure": torch.zeros(2)}, r"structure has shape \(2,\)"),
        ({"cell": torch.zeros(2, 3, 3)}, r"cell has shape \(2, 3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = {
        "edge_target": torch.tensor([0, 1]),
        "edge_source": torch.tensor([1, 2]),
        "num_atoms": 3,
        "num_ranks": 2,
        "positions": torch.zeros(3, 3),
    }
    with pytest.raises(ValueError, match=message):
        partition_atoms(**{**given, **change})  # type: ignore[arg-type]
