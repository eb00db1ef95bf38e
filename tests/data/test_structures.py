from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.io import write

from lightning_januspipe import keys
from lightning_januspipe.data import atoms_to_sample, read_structures
from lightning_januspipe.data.disk_dataset import open_dataset
from lightning_januspipe.data.labels import LabelKeys
from lightning_januspipe.data.structures import find_species, resolve_dtype, validate_species

VOIGT = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
FULL = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
WATER_FORCES = np.arange(9.0).reshape(3, 3)


def to_sample(atoms, **options):
    labels = LabelKeys(**{name: options.pop(name) for name in list(options) if name.endswith("_key")})
    defaults = {"species": ["H", "O", "Cu"], "cutoff": 3.0, "dtype": "float64", "labels": labels}
    return atoms_to_sample(atoms, **{**defaults, **options})


def test_molecule_sample(labelled):
    water = labelled(molecule("H2O", cell=[9.0, 9.0, 9.0]), energy=-1.5, forces=WATER_FORCES)
    sample = to_sample(water)
    assert sample[keys.SPECIES].tolist() == [1, 0, 0]
    assert sample[keys.ATOMIC_NUMBERS].tolist() == [8, 1, 1]
    assert sample[keys.BATCH].tolist() == [0, 0, 0]
    assert sample[keys.PBC].tolist() == [[False] * 3]
    assert (sample[keys.CELL] == 0).all() and sample[keys.CELL].shape == (1, 3, 3)
    assert sample[keys.ENERGY].tolist() == [-1.5]
    np.testing.assert_array_equal(sample[keys.POSITIONS].numpy(), water.positions)
    np.testing.assert_array_equal(sample[keys.FORCES].numpy(), WATER_FORCES)
    assert sample[keys.STRESS].shape == (1, 3, 3) and sample[keys.STRESS].isnan().all()
    assert sample[keys.EDGE_INDEX].shape == (2, 6) and sample[keys.CELL_SHIFTS].shape == (6, 3)


@pytest.mark.parametrize("dtype", ["float32", torch.float64, None])
def test_types(labelled, dtype):
    sample = to_sample(labelled(molecule("H2O"), energy=-1.5, forces=WATER_FORCES), dtype=dtype)
    real = {"float32": torch.float32, torch.float64: torch.float64, None: torch.get_default_dtype()}[dtype]
    for name in (keys.POSITIONS, keys.CELL_SHIFTS, keys.CELL, keys.FORCES, keys.STRESS):
        assert sample[name].dtype == real, name
    assert sample[keys.ENERGY].dtype == torch.float64  # all-electron energies have more digits than float32
    for name in (keys.SPECIES, keys.ATOMIC_NUMBERS, keys.EDGE_INDEX, keys.BATCH):
        assert sample[name].dtype == torch.int64, name
    assert sample[keys.PBC].dtype == torch.bool


def test_edge_vectors_follow_the_convention(labelled):
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=1)
    shear = np.array([[0, 0.3, 0], [0, 0, 0.2], [0.1, 0, 0]])
    crystal.set_cell(crystal.cell.array + shear, scale_atoms=True)
    sample = to_sample(labelled(crystal, energy=0.0, forces=np.zeros((4, 3))))
    j, i = sample[keys.EDGE_INDEX]
    vectors = sample[keys.POSITIONS][j] + sample[keys.CELL_SHIFTS] @ sample[keys.CELL][0] - sample[keys.POSITIONS][i]
    lengths = vectors.norm(dim=1)
    assert len(lengths) > 0 and lengths.max() <= 3.0 and lengths.min() > 2.0


@pytest.mark.parametrize("stress", [VOIGT, FULL, FULL.reshape(9)])
def test_stress_layouts(labelled, stress):
    crystal = bulk("Cu")
    crystal.info["my_stress"] = stress
    sample = to_sample(labelled(crystal, energy=0.0, forces=np.zeros((1, 3))), stress_key="my_stress")
    np.testing.assert_array_equal(sample[keys.STRESS][0].numpy(), FULL)


def test_stress_of_calculator_and_without(labelled):
    crystal = labelled(bulk("Cu"), energy=0.0, forces=np.zeros((1, 3)), stress=VOIGT)
    np.testing.assert_array_equal(to_sample(crystal)[keys.STRESS][0].numpy(), FULL)
    assert to_sample(crystal, stress_key=None)[keys.STRESS].isnan().all()
    molecule_with_stress = labelled(Atoms("H"), energy=0.0, forces=np.zeros((1, 3)), stress=VOIGT)
    assert to_sample(molecule_with_stress)[keys.STRESS].isnan().all()


def test_labels_under_other_names():
    water = molecule("H2O")
    water.info["REF_energy"] = -2.0
    water.arrays["REF_forces"] = WATER_FORCES
    sample = to_sample(water, energy_key="REF_energy", forces_key="REF_forces")
    assert sample[keys.ENERGY].item() == -2.0
    np.testing.assert_array_equal(sample[keys.FORCES].numpy(), WATER_FORCES)


def test_constraints_do_not_change_forces(labelled):
    from ase.constraints import FixAtoms

    water = labelled(molecule("H2O"), energy=0.0, forces=WATER_FORCES)
    water.set_constraint(FixAtoms([0, 1, 2]))
    np.testing.assert_array_equal(to_sample(water)[keys.FORCES].numpy(), WATER_FORCES)


def test_live_calculator_and_stale_results():
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    crystal.calc = EMT()
    energy = crystal.get_potential_energy()
    crystal.get_forces()
    assert to_sample(crystal)[keys.ENERGY].item() == energy
    crystal.positions[0, 0] += 0.1
    with pytest.raises(ValueError, match=r"frame 7: the calculator's energy 'energy' was computed for other positions"):
        to_sample(crystal, source="frame 7")


def test_labels_not_required():
    sample = to_sample(molecule("H2O"), require_labels=False)
    assert sample[keys.ENERGY].isnan().all() and sample[keys.ENERGY].shape == (1,)
    assert sample[keys.FORCES].isnan().all() and sample[keys.FORCES].shape == (3, 3)


def test_single_atom(labelled):
    sample = to_sample(labelled(Atoms("Cu"), energy=1.0, forces=np.zeros((1, 3))))
    assert sample[keys.EDGE_INDEX].shape == (2, 0) and sample[keys.CELL_SHIFTS].shape == (0, 3)
    assert sample[keys.SPECIES].tolist() == [2]


def test_missing_labels_name_what_was_found(labelled):
    water = labelled(molecule("H2O"), energy=-1.0)
    water.info["REF_energy"] = 0.0
    water.arrays["REF_forces"] = WATER_FORCES
    with pytest.raises(ValueError, match="no forces label") as error:
        to_sample(water, source="data.xyz, frame 4")
    message = str(error.value)
    assert "data.xyz, frame 4 has no forces label 'forces'" in message
    for found in ("'energy'", "'REF_energy'", "'REF_forces'", "`forces_key`"):
        assert found in message
    with pytest.raises(ValueError, match=r"structure has no energy label 'E'.*`energy_key`"):
        to_sample(water, energy_key="E")


@pytest.mark.parametrize("pbc", [True, [True, True, False], False])
def test_atoms_far_away_keep_their_digits(labelled, pbc):
    crystal = bulk("Cu", cubic=True).repeat(2)
    crystal.rattle(0.1, seed=0)
    crystal.pbc = pbc
    rng = np.random.default_rng(0)
    far = crystal.copy()
    far.positions += (rng.integers(-3000, 3000, size=(32, 3)) * crystal.pbc) @ crystal.cell.array + [5e4, 0, 0]
    vectors = []
    for atoms in (crystal, far):
        atoms = labelled(atoms, energy=0.0, forces=np.zeros((32, 3)))
        sample = to_sample(atoms, dtype="float32")
        j, i = sample[keys.EDGE_INDEX]
        shift = sample[keys.CELL_SHIFTS] @ sample[keys.CELL][0]
        found = sample[keys.POSITIONS][j] + shift - sample[keys.POSITIONS][i]
        vectors.append(found[np.lexsort(found.round(decimals=3).T.numpy())])
    torch.testing.assert_close(*vectors, rtol=0, atol=2e-5)


def test_placeholders_are_no_species():
    dummy = molecule("H2O")
    dummy.numbers[2] = 0
    assert find_species([dummy]) == ["H", "O"]
    with pytest.raises(ValueError, match=r"frame 2 holds the unknown species X"):
        to_sample(dummy, require_labels=False, source="frame 2")


def test_unknown_species():
    with pytest.raises(ValueError, match=r"frame 2 holds the unknown species H, O; known: \['Cu', 'Al'\]"):
        to_sample(molecule("H2O"), species=["Cu", "Al"], require_labels=False, source="frame 2")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_labels_that_are_not_finite(labelled, bad):
    forces = WATER_FORCES.copy()
    forces[1, 2] = bad
    with pytest.raises(ValueError, match=r"frame 1: label 'forces' has NaN or infinite values \(1 of 9\)"):
        to_sample(labelled(molecule("H2O"), energy=0.0, forces=forces), source="frame 1")
    with pytest.raises(ValueError, match="label 'energy' has NaN or infinite"):
        to_sample(labelled(molecule("H2O"), energy=bad, forces=WATER_FORCES))
    with pytest.raises(ValueError, match="label 'stress' has NaN or infinite"):
        to_sample(labelled(bulk("Cu"), energy=0.0, forces=np.zeros((1, 3)), stress=np.full(6, bad)))


def test_labels_of_wrong_shape_or_kind():
    water = molecule("H2O")
    water.info.update(energy=[1.0, 2.0], forces=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"energy label 'energy' has shape \(2,\); expected one number"):
        to_sample(water)
    water.info["energy"] = "low"
    with pytest.raises(ValueError, match="label 'energy' is 'low'; expected numbers"):
        to_sample(water)
    water.info["energy"] = np.array([1.0])
    with pytest.raises(ValueError, match=r"forces label 'forces' has shape \(2, 3\); expected \(3, 3\)"):
        to_sample(water)
    water.info.update(forces=WATER_FORCES, stress=np.zeros(5))
    water.set_cell(np.eye(3) * 9)
    water.set_pbc(True)
    with pytest.raises(ValueError, match=r"stress label 'stress' has shape \(5,\)"):
        to_sample(water)


def test_no_atoms_and_no_neighbor_list():
    with pytest.raises(ValueError, match="frame 0 has no atoms"):
        to_sample(Atoms(), source="frame 0")
    with pytest.raises(ValueError, match=r"frame 3: pbc=.* has a zero vector"):
        to_sample(Atoms("H", pbc=True), source="frame 3", require_labels=False)


def test_validate_species_and_dtype():
    assert validate_species(("O", "H")) == ["O", "H"]
    for species, message in (
        ([], "chemical symbols"),
        ("Cu", "'Cu'"),
        (["Xx"], r"\['Xx'\]"),
        (["H", "H"], "more than"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_species(species)
    for dtype in ("float16", torch.int64):
        with pytest.raises(ValueError, match="expected 'float32', 'float64' or None"):
            resolve_dtype(dtype)


def test_read_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no such data file: .*absent\.xyz"):
        read_structures(tmp_path / "absent.xyz")
    (tmp_path / "empty.extxyz").touch()
    with pytest.raises(ValueError, match=r"empty\.extxyz is empty"):
        read_structures(tmp_path / "empty.extxyz")
    (tmp_path / "text.extxyz").write_text("this is no structure\n")
    with pytest.raises(ValueError, match=r"ASE cannot read .*text\.extxyz"):
        read_structures(tmp_path / "text.extxyz")
    (tmp_path / "text.unknown").write_text("neither is this\n")
    with pytest.raises(ValueError, match="ASE cannot read"):
        read_structures(tmp_path / "text.unknown")


@pytest.mark.parametrize("lazy", [False, True])
def test_frames_after_an_empty_line_are_not_left_out(tmp_path, lazy):
    """ASE stops at an empty line, such as one between two files that were joined."""
    write(tmp_path / "one.extxyz", [molecule("H2O"), molecule("CH4")])
    text = (tmp_path / "one.extxyz").read_text()
    (tmp_path / "joined.extxyz").write_text(f"{text}\n{text}")
    with pytest.raises(ValueError, match=r"joined\.extxyz .*line 13 is empty, and ASE would ignore what follows"):
        open_dataset(tmp_path / "joined.extxyz", lazy=lazy, cache_dir=tmp_path, cutoff=3.0, require_labels=False)
    (tmp_path / "ended.extxyz").write_text(f"{text}\n \n")
    assert (
        len(open_dataset(tmp_path / "ended.extxyz", lazy=lazy, cache_dir=tmp_path, cutoff=3.0, require_labels=False))
        == 2
    )


def test_at_sign_in_a_file_name(tmp_path):
    path = tmp_path / "run@1.extxyz"
    write(tmp_path / "run.extxyz", [molecule("H2O"), molecule("CH4"), molecule("N2")])
    (tmp_path / "run.extxyz").rename(path)
    assert [len(atoms) for atoms in read_structures(path)] == [3, 5, 2]
