from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from lightning_januspipe.calculator import SkinNeighborList
from lightning_januspipe.data import neighbor_list

CUTOFF = 3.5


def random_atoms(rng: np.random.Generator, num_atoms: int, length: float, pbc) -> Atoms:
    cell = length * np.eye(3) + rng.normal(0, 0.2, (3, 3))
    return Atoms("H" * num_atoms, rng.uniform(-0.5, 1.5, (num_atoms, 3)) @ cell, cell=cell, pbc=pbc)


def assert_same_edges(skin: SkinNeighborList, atoms: Atoms) -> None:
    found = skin.edges(atoms)
    edge_index, shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    np.testing.assert_array_equal(found.edge_index, edge_index)
    np.testing.assert_array_equal(found.cell_shifts, shifts)
    vectors = atoms.positions[edge_index[0]] + shifts @ atoms.cell.array - atoms.positions[edge_index[1]]
    np.testing.assert_allclose(found.vectors, vectors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pbc", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("length", [2.0, 5.0, 9.0])
def test_edges_are_those_of_a_new_search_along_a_trajectory(pbc, length) -> None:
    rng = np.random.default_rng([int(length), *pbc])
    atoms, skin = random_atoms(rng, 9, length, pbc), SkinNeighborList(CUTOFF, 1.5)
    for step in range(40):
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        if step % 3 == 0:  # a barostat
            strain = np.eye(3) + rng.normal(0, 0.004, (3, 3))
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        if step == 25:
            atoms.positions[2] += [0.0, 0.0, 4.0]
        assert_same_edges(skin, atoms)
    assert skin.num_searches < 30


@pytest.mark.parametrize("seed", range(30))
def test_no_pair_is_missed_where_atoms_and_cell_move_much(seed: int) -> None:
    """Moves up to half the skin and strains on either side of it, so that a looser rule would miss pairs."""
    rng = np.random.default_rng(seed)
    atoms, skin = random_atoms(rng, 12, 6.0, [True, True, seed % 2 == 0]), SkinNeighborList(CUTOFF, 0.6)
    for _ in range(20):
        kind = rng.integers(3)
        if kind == 0:
            directions = rng.normal(size=atoms.positions.shape)
            atoms.positions += directions / np.linalg.norm(directions, axis=1)[:, None] * rng.uniform(0, 0.32)
        elif kind == 1:
            atoms.set_cell(atoms.cell.array * rng.uniform(0.9, 1.1), scale_atoms=True)
        else:
            atoms.set_cell(atoms.cell.array * rng.uniform(0.97, 1.03), scale_atoms=False)
        assert_same_edges(skin, atoms)


def test_a_list_is_used_again_until_it_may_be_wrong() -> None:
    atoms, skin = bulk("Cu", cubic=True) * 2, SkinNeighborList(CUTOFF, 1.0)
    assert_same_edges(skin, atoms)
    atoms.positions += [30.0, 0.0, 0.0]  # all together
    atoms.positions[0] += [0.45, 0.0, 0.0]
    assert_same_edges(skin, atoms)
    atoms.set_cell(atoms.cell.array * 1.2, scale_atoms=True)  # pairs move apart
    assert_same_edges(skin, atoms)
    assert skin.num_searches == 1
    atoms.positions[0] += [0.2, 0.0, 0.0]
    atoms.set_cell(atoms.cell.array / 1.2, scale_atoms=True)
    assert_same_edges(skin, atoms)
    assert skin.num_searches == 2
    atoms.set_cell(atoms.cell.array * 0.75, scale_atoms=True)
    assert_same_edges(skin, atoms)
    assert skin.num_searches == 3


def test_other_structures_are_searched() -> None:
    atoms, skin = bulk("Cu", cubic=True), SkinNeighborList(CUTOFF)
    assert_same_edges(skin, atoms)
    for change in (
        lambda a: a + Atoms("H", [[0.9, 0.9, 0.9]]),
        lambda a: a[1:],
        lambda a: Atoms(a.symbols, a.positions, cell=a.cell, pbc=[True, False, True]),
        lambda a: Atoms(a.symbols, a.positions),
        lambda a: Atoms("H", [[0.0, 0.0, 0.0]]),
        lambda a: Atoms("H", [[0.0, 0.0, 0.0]], cell=[1.5, 1.5, 1.5], pbc=True),
        lambda a: a * 3,
    ):
        atoms = change(atoms)
        before = skin.num_searches
        assert_same_edges(skin, atoms)
        assert skin.num_searches == before + 1
    atoms.wrap()
    atoms.positions[0] += atoms.cell.array[0]
    assert_same_edges(skin, atoms)


def test_the_cell_of_a_molecule_counts_for_nothing() -> None:
    skin = SkinNeighborList(CUTOFF)
    water = Atoms("OH2", [[0, 0, 0], [1, 0, 0], [0, 1, 0]], cell=[8, 8, 8])
    assert_same_edges(skin, water)
    water.set_cell([0, 0, 0])
    assert_same_edges(skin, water)
    assert skin.num_searches == 1


def test_without_a_skin_every_call_searches() -> None:
    atoms, skin = bulk("Cu"), SkinNeighborList(CUTOFF, 0.0)
    for _ in range(3):
        assert_same_edges(skin, atoms)
    assert skin.num_searches == 3


def test_an_error_leaves_no_list_behind() -> None:
    atoms, skin = bulk("Cu", cubic=True), SkinNeighborList(CUTOFF)
    skin.edges(atoms)
    bad = atoms.copy()
    bad.positions[1] = np.nan
    with pytest.raises(ValueError, match="position of atom 1 is NaN"):
        skin.edges(bad)
    assert_same_edges(skin, atoms)
    with pytest.raises(ValueError, match=r"skin=-1 Å; expected a finite number, at least 0"):
        SkinNeighborList(CUTOFF, -1)
