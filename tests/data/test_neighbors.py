from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_januspipe.data import neighbor_list

BACKENDS = ["vesin", "matscipy"]


def brute_force(positions, cell, pbc, cutoff):
    """All (i, j, S) with 0 < |r_j + S @ cell - r_i| < cutoff, by trying every image that could be in reach."""
    periodic = np.flatnonzero(pbc)
    reach = np.zeros(3, dtype=int)
    if len(periodic):
        # Row norms of the pseudo-inverse bound a fractional coordinate by a distance.
        inverse = np.linalg.pinv(np.asarray(cell)[periodic])
        span = np.linalg.norm(np.ptp(positions, axis=0))
        reach[periodic] = np.ceil(np.linalg.norm(inverse, axis=0) * (cutoff + span)).astype(int)
    edges = []
    for shift in itertools.product(*(range(-n, n + 1) for n in reach)):
        vectors = positions[None] + np.array(shift) @ cell - positions[:, None]
        for i, j in np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff):
            if i != j or any(shift):
                edges.append((int(i), int(j), *shift))
    return sorted(edges)


def as_tuples(edge_index, cell_shifts):
    return [(int(i), int(j), *map(int, s)) for j, i, s in zip(*edge_index, cell_shifts, strict=True)]


def random_structure(seed, pbc, num_atoms):
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(1.0, 4.0, 3)) + rng.uniform(-0.4, 0.4, (3, 3))
    positions = rng.uniform(-1.5, 2.5, (num_atoms, 3)) @ cell  # many of them outside the cell
    return positions, cell, np.array(pbc)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero_open_vectors", [False, True])
@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
def test_equals_brute_force(backend, pbc, zero_open_vectors):
    for seed in range(4):
        positions, cell, pbc_array = random_structure(seed, pbc, num_atoms=1 + 2 * seed)
        if zero_open_vectors:
            cell[~pbc_array] = 0.0
        cutoff = 2.0 + seed
        found = as_tuples(*neighbor_list(positions, cell, pbc, cutoff, backend=backend))
        # Equality with a sorted list also checks the order: target, source, shift.
        assert found == brute_force(positions, cell, pbc, cutoff)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    num_atoms=st.integers(1, 6),
    cutoff=st.floats(0.5, 4.0),
)
def test_list_is_symmetric_and_within_cutoff(seed, pbc, num_atoms, cutoff):
    positions, cell, _ = random_structure(seed, pbc, num_atoms)
    edge_index, shifts = neighbor_list(positions, cell, pbc, cutoff)
    lengths = np.linalg.norm(positions[edge_index[0]] + shifts @ cell - positions[edge_index[1]], axis=1)
    assert (lengths <= cutoff).all()
    forward = as_tuples(edge_index, shifts)
    assert forward == sorted((j, i, -a, -b, -c) for i, j, a, b, c in forward)
    assert as_tuples(*neighbor_list(positions, cell, pbc, cutoff, backend="matscipy")) == forward


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_much_smaller_than_cutoff(backend):
    atoms = bulk("Cu", "fcc", a=3.6)  # one atom; shells of fcc at a/√2, a, a√1.5, a√2 hold 12, 6, 24, 12
    edge_index, shifts = neighbor_list(atoms.positions, atoms.cell, atoms.pbc, 3.6 * 1.45, backend=backend)
    assert edge_index.shape == (2, 12 + 6 + 24 + 12)
    assert (edge_index == 0).all() and (shifts != 0).any(axis=1).all()


def test_slab_has_no_edges_through_vacuum():
    slab = fcc111("Cu", (1, 1, 3), a=3.6)  # its third cell vector is zero
    assert slab.pbc.tolist() == [True, True, False]
    edge_index, shifts = neighbor_list(slab.positions, slab.cell, slab.pbc, 2.8)
    assert (shifts[:, 2] == 0).all()
    assert np.bincount(edge_index[1]).tolist() == [9, 12, 9]


def test_molecule_ignores_its_cell():
    water = molecule("H2O")
    free = neighbor_list(water.positions, np.zeros((3, 3)), [False] * 3, 2.0)
    boxed = neighbor_list(water.positions, np.eye(3) * 0.3, [False] * 3, 2.0)
    assert as_tuples(*free) == [(i, j, 0, 0, 0) for i in range(3) for j in range(3) if i != j] == as_tuples(*boxed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pbc", [False, True])
def test_single_atom_without_neighbors(backend, pbc):
    edge_index, shifts = neighbor_list([[1.0, 2.0, 3.0]], np.eye(3) * 20, [pbc] * 3, 5.0, backend=backend)
    assert edge_index.shape == (2, 0) and shifts.shape == (0, 3)
    assert edge_index.dtype == np.int64 and shifts.dtype == np.int64


def test_distant_atoms_have_no_edges():
    edge_index, shifts = neighbor_list([[0, 0, 0], [9.0, 0, 0]], np.zeros((3, 3)), [False] * 3, 5.0)
    assert edge_index.shape == (2, 0) and shifts.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": 0.0}, "cutoff=0.0 Å; expected a positive, finite number"),
        ({"cutoff": float("inf")}, "cutoff=inf Å"),
        ({"positions": [[0.0, 0.0]]}, r"positions have shape \(1, 2\)"),
        ({"cell": np.eye(2)}, r"shapes \(2, 2\) and \(3,\)"),
        ({"pbc": True}, r"shapes \(3, 3\) and \(\)"),
        ({"positions": [[0.0, 0.0, 0.0], [np.nan, 0.0, 0.0]]}, "position of atom 1 is NaN or infinite"),
        ({"cell": np.full((3, 3), np.nan)}, "cell has NaN or infinite entries"),
        ({"cell": np.diag([4.0, 4.0, 0.0])}, "zero vector along a periodic direction"),
        ({"cell": [[4.0, 0, 0], [0, 4.0, 0], [4.0, 4.0, 0]]}, "linearly dependent"),
        ({"positions": [[0.0, 0.0, 0.0], [1.0, 0, 0], [5.0, 0, 0]]}, "atoms 1 and 2 are .* apart"),
        ({"backend": "other"}, "backend 'other' is unknown"),
    ],
)
def test_errors(change, message):
    arguments = {"positions": [[0.0, 0.0, 0.0]], "cell": np.eye(3) * 4, "pbc": [True] * 3, "cutoff": 3.0, **change}
    with pytest.raises(ValueError, match=message):
        neighbor_list(**arguments)
