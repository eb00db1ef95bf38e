from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import read, write

from lightning_januspipe import keys
from lightning_januspipe.data import StructureDataset, emt_structures
from lightning_januspipe.data.labels import LabelKeys, read_labels
from lightning_januspipe.data.units import unit_factor

VOIGT = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
FULL = np.array([[0.01, 0.06, 0.05], [0.06, 0.02, 0.04], [0.05, 0.04, 0.03]])
FORCES = np.arange(9.0).reshape(3, 3)


def labels_of(atoms, required=False, **names):
    return read_labels(atoms, LabelKeys(**names), required=required, source="frame 3")


@pytest.fixture
def referenced(tmp_path):
    """Alloys as other programs write them: labels with a prefix, and virials beside the stress."""
    structures = []
    for atoms in emt_structures(4, sizes=(4, 8)):
        stress = atoms.get_stress(voigt=False)
        bare = atoms.copy()
        bare.info.update(REF_energy=atoms.get_potential_energy(), REF_stress=stress)
        bare.info["REF_virials"] = -stress * atoms.get_volume()
        bare.arrays["REF_forces"] = atoms.get_forces()
        structures.append(bare)
    write(tmp_path / "ref.extxyz", structures)
    return tmp_path / "ref.extxyz"


REF = {"energy_key": "REF_energy", "forces_key": "REF_forces"}


def test_virials_have_their_own_key_sign_and_volume(referenced):
    options = {"cutoff": 3.0, "dtype": "float64", **REF}
    stresses = StructureDataset(referenced, stress_key="REF_stress", **options)
    virials = StructureDataset(referenced, stress_key=None, virial_key="REF_virials", **options)
    both = StructureDataset(referenced, stress_key="REF_stress", virial_key="REF_virials", **options)
    for index, atoms in enumerate(emt_structures(4, sizes=(4, 8))):
        expected = atoms.get_stress(voigt=False)
        for dataset in (stresses, virials, both):
            np.testing.assert_allclose(dataset[index][keys.STRESS][0].numpy(), expected, atol=1e-7)


def test_a_virial_is_no_stress(referenced):
    with pytest.raises(ValueError, match="stress_key='REF_virials' names a virial.*use virial_key"):
        StructureDataset(referenced, cutoff=3.0, stress_key="REF_virials", **REF)
    wrong = read(referenced, 0)
    wrong.info["REF_virials"] *= -1  # another convention
    with pytest.raises(ValueError, match=r"frame 3: stress 'REF_stress' and virial 'REF_virials' disagree"):
        labels_of(wrong, stress_key="REF_stress", virial_key="REF_virials")


@pytest.mark.parametrize("stress", [VOIGT, FULL, FULL.reshape(9), FULL[None], VOIGT[None]])
def test_shapes_of_stress_and_virial(stress):
    atoms = bulk("Cu")
    atoms.info.update(s=stress, v=stress)
    np.testing.assert_array_equal(labels_of(atoms, stress_key="s")[keys.STRESS], FULL)
    found = labels_of(atoms, stress_key=None, virial_key="v")[keys.STRESS]
    np.testing.assert_allclose(found, -FULL / atoms.get_volume())


def test_components_in_another_order_are_found():
    atoms = bulk("Cu")
    atoms.info["stress"] = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 0.0, 0.0]])  # xx yy zz yz xz xy 0 0 0
    with pytest.raises(ValueError, match="stress label 'stress' is not symmetric.*components are in another order"):
        labels_of(atoms)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [([3, 3, 3], False), ([3, 3, 0], [True, True, False]), (None, False)],
    ids=["molecule", "2d", "none"],
)
def test_no_stress_without_a_volume(cell, pbc):
    atoms = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=cell, pbc=pbc)
    atoms.info.update(stress=VOIGT, virial=VOIGT)
    assert np.isnan(labels_of(atoms, virial_key="virial")[keys.STRESS]).all()


def test_stress_of_a_slab_with_vacuum():
    slab = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=[3, 3, 20], pbc=[True, True, False])
    slab.info["stress"] = VOIGT
    np.testing.assert_array_equal(labels_of(slab)[keys.STRESS], FULL)


@pytest.mark.parametrize(
    ("kind", "unit", "factor"),
    [
        ("energy", "meV", 1e-3),
        ("energy", "Hartree", 27.2114),
        ("energy", "kcal/mol", 0.0433641),
        ("forces", "meV/Ang", 1e-3),
        ("forces", "Hartree/Bohr", 51.4221),
        ("forces", "kcal/mol/Å", 0.0433641),
        ("forces", "kJ/mol/nm", 0.00103643),
        ("stress", "GPa", 0.00624151),
        ("stress", "kbar", 0.000624151),
        ("stress", "Hartree/Bohr^3", 183.631),
        ("stress", "meV/Å**3", 1e-3),
    ],
)
def test_units(kind, unit, factor):
    assert unit_factor(kind, unit) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "unit"),
    [("energy", "eV/Å"), ("forces", "eV"), ("forces", "GPa"), ("stress", "eV/Å"), ("stress", "eV"), ("energy", "EV")],
)
def test_units_of_other_quantities_are_refused(kind, unit):
    with pytest.raises(ValueError, match=f"unit '{unit}' of {kind} labels is unknown; expected one such as"):
        LabelKeys(**{f"{kind}_unit": unit})


def test_labels_in_other_units_are_those_in_ev(referenced):
    plain = StructureDataset(referenced, cutoff=3.0, dtype="float64", stress_key="REF_stress", **REF)
    scaled = []
    for atoms in read(referenced, ":"):
        atoms.info["E"] = atoms.info["REF_energy"] / units.Hartree
        atoms.arrays["F"] = atoms.arrays["REF_forces"] / (units.Hartree / units.Bohr)
        atoms.info["S"] = atoms.info["REF_stress"] / units.GPa
        atoms.info["V"] = atoms.info["REF_virials"] / units.Hartree
        scaled.append(atoms)
    other = {"energy_unit": "Hartree", "forces_unit": "Hartree/Bohr", "stress_unit": "GPa"}
    names = {"energy_key": "E", "forces_key": "F", "stress_key": "S", "virial_key": "V"}
    converted = StructureDataset(scaled, cutoff=3.0, dtype="float64", **names, **other)
    for index in range(4):
        for name in (keys.ENERGY, keys.FORCES, keys.STRESS):
            np.testing.assert_allclose(converted[index][name], plain[index][name], rtol=1e-6, atol=1e-7)


def test_a_lone_atom_needs_no_forces():
    atom = Atoms("Cu", cell=[20, 20, 20], pbc=True)
    atom.info["energy"] = -3.0
    assert labels_of(atom, required=True)[keys.FORCES].tolist() == [[0.0, 0.0, 0.0]]
    atom.arrays["forces"] = np.array([[0.0, 0.1, 0.0]])  # in a field, say
    assert labels_of(atom, required=True)[keys.FORCES].tolist() == [[0.0, 0.1, 0.0]]
    with pytest.raises(ValueError, match=r"has no forces label 'forces'\. Keys found: 'energy' \(info\)"):
        pair = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]])
        pair.info["energy"] = -3.0
        labels_of(pair, required=True)


def test_labels_without_a_name_are_not_read():
    water = molecule("H2O")
    water.info["energy"] = -1.0
    found = labels_of(water, required=True, forces_key=None)
    assert found[keys.ENERGY] == -1.0 and np.isnan(found[keys.FORCES]).all()
    assert np.isnan(labels_of(water, required=True, energy_key=None, forces_key=None)[keys.ENERGY])


def test_two_labels_of_one_name_must_agree():
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-1.0, forces=FORCES)
    water.info["energy"] = np.array([-1.0])
    water.arrays["forces"] = FORCES + 1e-9
    assert labels_of(water)[keys.ENERGY] == -1.0
    water.info["energy"] = -2.0
    with pytest.raises(ValueError, match="frame 3 has two different labels 'energy', in results and in info"):
        labels_of(water)


def test_stress_twice_in_two_shapes():
    crystal = bulk("Cu")
    crystal.calc = SinglePointCalculator(crystal, stress=VOIGT)
    crystal.info["stress"] = FULL[None]
    np.testing.assert_array_equal(labels_of(crystal)[keys.STRESS], FULL)
    crystal.info["stress"] = 2 * FULL
    with pytest.raises(ValueError, match="two different labels 'stress'"):
        labels_of(crystal)


def test_labels_in_the_data_of_a_database(tmp_path):
    crystal = bulk("Cu", cubic=True)
    forces = np.arange(12.0).reshape(4, 3)
    with connect(tmp_path / "data.db") as database:
        crystal.calc = SinglePointCalculator(crystal, energy=-1.0, forces=forces, stress=VOIGT)
        database.write(crystal, data={"energy": np.array([-1.0]), "forces": forces, "stress": FULL[None]})
    (sample,) = StructureDataset(tmp_path / "data.db", cutoff=3.0, dtype="float64")
    assert sample[keys.ENERGY].tolist() == [-1.0]
    np.testing.assert_array_equal(sample[keys.STRESS][0], FULL)


def test_units_of_a_database(tmp_path):
    units_of = {"energy": "Hartree", "forces": "eV/Ang", "stress": "eV/Ang/Ang/Ang"}
    with connect(tmp_path / "units.db") as database:
        for atoms in emt_structures(2, sizes=(4,)):
            database.write(atoms)
        database.metadata = {"_property_unit_dict": units_of, "_distance_unit": "Ang"}
    with pytest.raises(ValueError, match="units.db has 'energy' in Hartree, and energy_unit='eV'; set energy_unit="):
        StructureDataset(tmp_path / "units.db", cutoff=3.0)
    StructureDataset(tmp_path / "units.db", cutoff=3.0, energy_unit="Hartree")
    with connect(tmp_path / "units.db") as database:
        database.metadata = {"_distance_unit": "Bohr"}
    with pytest.raises(ValueError, match="units.db has lengths in Bohr; expected Å"):
        StructureDataset(tmp_path / "units.db", cutoff=3.0)


def test_gradients_are_no_forces():
    with pytest.raises(ValueError, match="forces_key='dft_gradient' names a gradient, and forces are minus the"):
        LabelKeys(forces_key="dft_gradient")
