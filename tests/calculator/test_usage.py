"""The calculator is used as those of other packages are: with constraints, slabs, changes between calls, copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms, FixedPlane
from ase.io import read, write

from lightning_januspipe.calculator import AtomsAdapter, JanusPipeCalculator
from lightning_januspipe.models import PotentialModule

from .conftest import crystal
from .test_calculator import OtherAdapter, OtherPotential, slab


def results(atoms: Atoms, module: PotentialModule) -> dict[str, np.ndarray]:
    """Returns what a calculator of its own finds for a structure."""
    calculator = JanusPipeCalculator(module)
    calculator.calculate(atoms.copy(), ["energies"])
    return calculator.results


def assert_results(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10, err_msg=name)


def test_one_thing_changes_between_calls(trained: PotentialModule) -> None:
    atoms = crystal(2)
    atoms.calc = JanusPipeCalculator(trained)
    seen = []
    for change in (
        lambda: atoms.symbols.__setitem__(1, "Al"),
        lambda: atoms.set_cell(1.01 * atoms.cell),
        lambda: atoms.set_pbc([True, True, False]),
        lambda: atoms.set_pbc(False),
        lambda: atoms.set_pbc(True),
        lambda: atoms.positions.__setitem__(0, atoms.positions[0] + 0.1),
        lambda: atoms.append("Cu") or atoms.positions.__setitem__(-1, atoms.positions[0] + [0.0, 0.0, 2.2]),
        lambda: atoms.__delitem__(-1),
    ):
        change()
        atoms.get_potential_energies()
        assert_results(atoms.calc.results, results(atoms, trained))
        seen.append(atoms.get_potential_energy())
    assert len({round(energy, 6) for energy in seen}) == len(seen) - 2, "two of the changes take an earlier one back"


def test_direct_calls_keep_no_results_of_another_structure(trained: PotentialModule) -> None:
    calculator = JanusPipeCalculator(trained)
    calculator.calculate(crystal(1), ["energies"])
    dimer = Atoms("AlCu", [[0, 0, 0], [0, 0, 2.5]])
    calculator.calculate(dimer)
    assert calculator.results.keys() == {"energy", "free_energy", "forces"}


def test_stress_in_every_form(trained: PotentialModule) -> None:
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(trained)
    full = atoms.get_stress(voigt=False)
    np.testing.assert_array_equal(full, full.T)
    np.testing.assert_array_equal(atoms.get_stress(), full[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]])
    dimer = Atoms("AlCu", [[0, 0, 0], [0, 0, 2.5]], calculator=atoms.calc)
    for ask in (dimer.get_stress, atoms.get_stresses, atoms.get_magnetic_moments, atoms.get_charges):
        with pytest.raises(PropertyNotImplementedError):
            ask()


def test_constraints(trained: PotentialModule) -> None:
    """ASE applies them to the forces that atoms return; the calculator's own are whole."""
    atoms = slab()
    free = results(atoms, trained)["forces"]
    atoms.set_constraint([FixAtoms([0]), FixedPlane(1, [0, 0, 1])])
    atoms.calc = JanusPipeCalculator(trained)
    forces = atoms.get_forces()
    assert not forces[0].any() and not forces[1, 2] and forces[1, :2].all()
    np.testing.assert_allclose(atoms.get_forces(apply_constraint=False), free, rtol=0, atol=1e-10)


def test_slabs(trained: PotentialModule) -> None:
    """The vacuum, and the cell vector along it, count for nothing but the volume of the stress."""
    atoms = fcc111("Cu", (2, 2, 2), a=3.7, vacuum=5.0)
    atoms.rattle(0.1, seed=0)
    assert atoms.pbc.tolist() == [True, True, False]
    expected = results(atoms, trained)
    whole, wide, without = atoms.copy(), atoms.copy(), atoms.copy()
    whole.pbc = True
    wide.cell[2, 2] *= 2
    without.cell[2] = 0
    for other in (whole, wide, without):
        found = results(other, trained)
        np.testing.assert_allclose(found["energy"], expected["energy"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(found["forces"], expected["forces"], rtol=0, atol=1e-10)
        assert ("stress" in found) == (other is not without)
        if other is not without:
            stress = expected["stress"] * atoms.cell.volume / other.cell.volume
            np.testing.assert_allclose(found["stress"], stress, rtol=0, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(trained: PotentialModule, copied) -> None:
    """Structures go to other processes with their calculators."""
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(trained)
    forces = atoms.get_forces()
    other = copied(atoms)
    assert other.calc is not atoms.calc and other.calc.results["energy"] == atoms.get_potential_energy()
    other.positions += 0.1
    np.testing.assert_allclose(other.get_forces(), forces, rtol=0, atol=1e-10)
    alone = atoms.copy()
    assert alone.calc is None
    alone.calc = atoms.calc
    np.testing.assert_array_equal(alone.get_forces(), forces)


@pytest.mark.parametrize("name", ["one.extxyz", "one.traj", "one.db"])
def test_results_are_written(trained: PotentialModule, tmp_path, name: str) -> None:
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(trained)
    atoms.get_forces()
    write(tmp_path / name, atoms)
    found = read(tmp_path / name)
    assert isinstance(found, Atoms)
    assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    np.testing.assert_allclose(found.get_forces(), atoms.get_forces(), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.get_stress(), atoms.get_stress(), rtol=0, atol=1e-7)


def test_far_from_the_origin_potentials_of_other_packages_keep_their_digits() -> None:
    atoms = crystal(2)
    atoms.calc = JanusPipeCalculator(OtherPotential(), adapter=OtherAdapter(4.0), dtype="float32")
    expected = atoms.get_forces()
    cells = np.random.default_rng(0).integers(-3000, 3000, (len(atoms), 3))
    atoms.positions += cells @ atoms.cell.array
    np.testing.assert_allclose(atoms.get_forces(), expected, rtol=0, atol=1e-5)
    ethanol = molecule("CH3CH2OH")
    ethanol.calc = atoms.calc
    expected = ethanol.get_forces()
    ethanol.positions += 3e4
    np.testing.assert_allclose(ethanol.get_forces(), expected, rtol=0, atol=1e-4)


class Noted(AtomsAdapter):
    """Notes what it gets."""

    def batch_from_atoms(self, atoms, edges, dtype):
        source, target = edges.edge_index
        vectors = atoms.positions[source] + edges.cell_shifts @ atoms.cell.array - atoms.positions[target]
        np.testing.assert_allclose(vectors, edges.vectors, rtol=0, atol=1e-9)
        assert atoms.info == {"charge": 1, "spin": 2} and atoms.arrays["mine"].sum() == len(atoms)
        raise InterruptedError


@pytest.mark.parametrize("pbc", [[True] * 3, [True, False, True], [False] * 3])
def test_adapters_get_all_that_a_structure_has(trained: PotentialModule, pbc: list[bool]) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.positions += np.random.default_rng(0).uniform(-20, 20, (4, 3))
    atoms.pbc, atoms.info = pbc, {"charge": 1, "spin": 2}
    atoms.set_array("mine", np.ones(4))
    before = atoms.positions.copy()
    atoms.calc = JanusPipeCalculator(trained, adapter=Noted(4.0))
    with pytest.raises(InterruptedError):
        atoms.get_potential_energy()
    np.testing.assert_array_equal(atoms.positions, before)
