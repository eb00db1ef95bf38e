from __future__ import annotations

import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write

from lightning_januspipe import keys
from lightning_januspipe.data import ASEDataModule, StructureDataset, emt_structures


def labelled(atoms: Atoms, energy: float, **results) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)), **results)
    return atoms


@pytest.fixture
def setup(tmp_path):
    """Function that writes files and sets a data module up for a fit; returns the module and its warnings."""

    def run(train: list[Atoms], val: list[Atoms] | None = None, test: list[Atoms] | None = None, **options):
        files = {}
        for name, frames in (("train", train), ("val", val), ("test", test)):
            if frames is not None:
                write(tmp_path / f"{name}.extxyz", frames)
                files[f"{name}_file"] = str(tmp_path / f"{name}.extxyz")
        module = ASEDataModule(**files, cutoff=3.0, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.setup("fit")
        return module, " | ".join(str(warning.message) for warning in caught)

    return run


def test_counts_of_labels():
    crystal = emt_structures(1, sizes=(4,))[0]
    bare = crystal.copy()
    bare.info.update(energy=1.0)
    lone = Atoms("Cu")
    lone.info["energy"] = -3.0
    dataset = StructureDataset([crystal, bare, lone, molecule("H2O")], cutoff=3.0, require_labels=False)
    counts = dataset.count_labels()
    assert counts.num_structures == 4
    assert counts.present == {keys.ENERGY: 3, keys.FORCES: 1, keys.STRESS: 1}
    # The forces of a lone atom, and stresses without a volume, are not missing.
    assert counts.missing == {keys.ENERGY: 1, keys.FORCES: 2, keys.STRESS: 1}
    assert "'energy' (info) in 2 of 4" in counts.available and "'forces' (results) in 1 of 4" in counts.available
    assert dataset.count_labels([2, 0]).present == {keys.ENERGY: 2, keys.FORCES: 1, keys.STRESS: 1}


def test_kinds_that_validation_does_not_hold(setup):
    alloys = emt_structures(6, species=["Cu", "Ni"], sizes=(4,), seed=4)
    copper = emt_structures(3, species=["Cu"], sizes=(4,), seed=5)
    water = [labelled(molecule("H2O"), -14.0 - i) for i in range(2)]
    for atoms in water:
        atoms.positions *= 1.0 + 0.01 * atoms.get_potential_energy()
        atoms.calc.atoms = atoms.copy()
        atoms.info["config_type"] = "molecule"
    _, said = setup([*alloys, *water], copper)
    assert "holds no structure with H, O, Ni and no non-periodic structure and no structure with config_type=" in said
    others = emt_structures(9, species=["Cu", "Ni"], sizes=(4,), seed=6)
    _, said = setup([*alloys, *water], [*others, labelled(water[0], 0)])
    assert "holds no structure with config_type" not in said and "no structure with Ni" not in said
    lone = Atoms("Au")
    lone.info.update(energy=-3.0, config_type="IsolatedAtom")
    _, said = setup([*copper, lone], emt_structures(3, species=["Cu"], sizes=(4,), seed=8))
    assert "holds no" not in said


def test_stratified_splits_hold_every_kind(setup):
    alloys = emt_structures(40, species=["Cu", "Ni"], sizes=(4,), seed=4)
    rare = emt_structures(10, species=["Al"], sizes=(4,), seed=5)
    once = emt_structures(1, species=["Pd"], sizes=(4,), seed=6)
    for seed in range(5):
        module, said = setup([*alloys, *rare, *once], val_size=0.2, test_size=0.2, stratify=True, seed=seed)
        found = [[module.species[s[keys.SPECIES][0]] for s in module.dataset(n)] for n in ("train", "val", "test")]
        assert [len(one) for one in found] == [31, 10, 10]
        assert all(1 <= one.count("Al") <= 3 for one in found[1:]), seed
        assert [one.count("Pd") for one in found] == [1, 0, 0]
        assert "holds no structure with Pd" in said and "Al" not in said.split("Pd")[0]


def test_structures_of_training_in_other_data(setup):
    alloys = emt_structures(10, sizes=(4,))
    _, said = setup(alloys[:8], alloys[6:], alloys[7:9])
    assert "2 of 4 validation structures are training data too" in said
    assert "1 of 2 test structures are training data too" in said
    assert "training data too" not in setup(alloys[:6], alloys[6:8], alloys[8:])[1]


def test_one_structure_with_two_energies(setup):
    alloys = emt_structures(6, sizes=(4,))
    other = labelled(alloys[2], alloys[2].get_potential_energy() + 1.0)
    said = setup([*alloys, other])[1]
    assert "1 training structures occur more than once, with energies that differ by more than 1 meV/atom" in said
    assert "frame 2 and" in said and "frame 6" in said
    assert "more than once" not in setup([*alloys, alloys[2]])[1]
    other.info["task"] = "another level of theory"
    assert "more than once" not in setup([*alloys, other])[1]


def test_energies_per_atom(setup):
    totals = []
    for atoms in emt_structures(20, sizes=(4, 8, 16), seed=2):
        totals.append(labelled(atoms, atoms.get_potential_energy() - 4.0 * len(atoms)))
    assert "energies per atom" not in setup(totals)[1]
    per_atom = [labelled(atoms, atoms.get_potential_energy() / len(atoms)) for atoms in totals]
    assert "energies are nearly the same in structures of 4 and of 16 atoms, as energies per atom" in setup(per_atom)[1]


def test_free_energies(setup):
    smeared = [labelled(atoms, -3.0, free_energy=-3.25) for atoms in emt_structures(3, sizes=(4,))]
    said = setup(smeared)[1]
    assert "3 of 3 structures have a free energy that differs from their energy, by up to 0.25 eV" in said
    module, said = setup(smeared, energy_key="free_energy")
    assert "free energy" not in said
    assert [float(sample[keys.ENERGY]) for sample in module.dataset("train")] == [-3.25] * 3
    assert "free energy" not in setup([labelled(a, -3.0, free_energy=-3.0) for a in smeared])[1]


def test_all_splits_are_checked_before_training(setup, tmp_path):
    alloys = emt_structures(6, sizes=(4,))
    with pytest.raises(ValueError, match=r"test.extxyz, frame 0 holds the unknown species Pt"):
        setup(alloys, test=emt_structures(2, species=["Pt"], sizes=(4,)))
    broken = emt_structures(3, sizes=(4,))
    broken[2].calc.results["forces"][1, 2] = np.nan
    for split in ("val", "test"):
        with pytest.raises(ValueError, match=rf"{split}.extxyz, frame 2: label 'forces' has NaN"):
            setup(alloys, **{split: broken})
    twice = emt_structures(1, sizes=(8,))
    twice[0].positions[1] = twice[0].positions[0]
    with pytest.raises(ValueError, match=r"test.extxyz, frame 0: atoms 0 and 1 are .* apart"):
        setup(alloys, test=twice)
    module = ASEDataModule(str(tmp_path / "train.extxyz"), test_file="absent.extxyz", cutoff=3.0)
    with pytest.raises(ValueError, match=r"no such data file: absent\.extxyz"):
        module.setup("fit")


def test_splits_that_are_no_structure(setup):
    alloys = emt_structures(4, sizes=(4,))
    for name in ("val", "test"):
        with pytest.raises(ValueError, match=rf"{name}=0.1 of 4 structures is less than one; give a larger fraction"):
            setup(alloys, **{f"{name}_size": 0.1})
    assert len(setup(alloys, val_size=0)[0].dataset("train")) == 4


def test_no_full_batch(setup):
    alloys = emt_structures(4, sizes=(4,))
    with pytest.raises(ValueError, match="batch_size=8 with drop_last, but there are 4 training structures: no batch"):
        setup(alloys, batch_size=8, drop_last=True)
    setup(alloys, batch_size=4, drop_last=True)
    setup(alloys, batch_size=8)


def test_forces_under_constraints(setup):
    alloys = emt_structures(4, sizes=(4,))
    for atoms in alloys[:2]:
        atoms.set_constraint(FixAtoms([0, 1]))
    assert "constraint" not in setup(alloys)[1]  # raw forces
    for atoms in alloys[:2]:
        atoms.calc.results["forces"][:2] = 0.0
    said = setup(alloys)[1]
    assert "2 of 4 structures, such as" in said and "have forces of exactly zero on all atoms with a constraint" in said


def test_forces_that_do_not_sum_to_zero(setup):
    alloys = emt_structures(4, sizes=(8,))
    assert "sum to zero" not in setup(alloys)[1]
    alloys[1].calc.results["forces"][0] += [0.0, 0.0, 2.0]
    said = setup(alloys)[1]
    assert "the forces of 1 of 4 structures do not sum to zero, by up to 2 eV/Å in" in said and "frame 1" in said


def test_charges_that_the_potential_does_not_see(setup):
    alloys = emt_structures(4, sizes=(4,))
    for atoms in alloys:
        atoms.info["charge"] = 1
    assert "charge" not in setup(alloys)[1]
    alloys[2].info["charge"] = -1
    assert "structures differ in charge or spin (charge=-1; charge=1), which is not an input" in setup(alloys)[1]
