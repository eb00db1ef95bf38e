from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from torch.utils.data import Subset

from lightning_januspipe.data import StructureDataset, dataset_statistics

SHIFTS = {"H": -13.6, "C": -1029.0, "O": -2041.5}


@pytest.fixture
def molecules(labelled):
    rng = np.random.default_rng(0)
    structures = []
    for symbols in ("H2", "CO", "H2O", "CH4", "CO2", "H4CO"):
        atoms = Atoms(symbols)
        atoms.positions = rng.permutation(len(atoms))[:, None] * np.array([2.0, 0.0, 0.0])
        energy = sum(SHIFTS[symbol] for symbol in atoms.symbols)
        structures.append(labelled(atoms, energy=energy, forces=rng.normal(size=(len(atoms), 3))))
    return structures


def test_exact_for_additive_energies(molecules):
    # A list of species with one that is absent, and in another order than that of the atomic numbers.
    dataset = StructureDataset(molecules, cutoff=2.5, species=["O", "Cu", "H", "C"], dtype="float64")
    statistics = dataset_statistics(dataset)
    assert statistics.energy_shifts == pytest.approx((SHIFTS["O"], 0.0, SHIFTS["H"], SHIFTS["C"]), abs=1e-8)
    assert statistics.energy_rms == pytest.approx(0.0, abs=1e-8)
    forces = np.concatenate([atoms.calc.results["forces"] for atoms in molecules])
    assert statistics.force_rms == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-12)
    # Chains of n atoms with spacing 2 Å have 2(n - 1) edges within 2.5 Å.
    num_edges = sum(2 * (len(atoms) - 1) for atoms in molecules)
    num_atoms = sum(map(len, molecules))
    assert (statistics.num_structures, statistics.num_atoms, statistics.num_edges) == (6, num_atoms, num_edges)
    assert statistics.avg_num_neighbors == num_edges / num_atoms


def test_residual_energy(labelled):
    energies = [1.0, 3.0]
    structures = [labelled(bulk("Cu"), energy=energy, forces=np.zeros((1, 3))) for energy in energies]
    statistics = dataset_statistics(StructureDataset(structures, cutoff=2.6, dtype="float64"))
    assert statistics.energy_shifts == pytest.approx((2.0,))
    assert statistics.energy_rms == pytest.approx(1.0)
    assert statistics.avg_num_neighbors == 12 and statistics.force_rms == 0


def test_one_composition_reproduces_the_energy(reference_file):
    dataset = StructureDataset(reference_file("ethanol.extxyz"), cutoff=3.0, dtype="float64")
    statistics = dataset_statistics(dataset)  # C2H6O only: the shifts are not unique
    mean = np.mean([dataset[index]["energy"].item() for index in range(len(dataset))])
    assert np.dot(statistics.energy_shifts, [6, 2, 1]) == pytest.approx(mean)
    assert np.linalg.norm(statistics.energy_shifts) == pytest.approx(abs(mean) / np.sqrt(6**2 + 2**2 + 1))


def test_subset_and_number_of_species(molecules):
    dataset = StructureDataset(molecules, cutoff=2.5)
    statistics = dataset_statistics(Subset(Subset(dataset, [0, 1]), [0]))  # H2
    assert len(statistics.energy_shifts) == 3
    assert statistics.energy_shifts == pytest.approx((SHIFTS["H"], 0, 0), rel=1e-6)
    samples = [dataset[0]]
    assert len(dataset_statistics(samples).energy_shifts) == 1
    assert len(dataset_statistics(samples, num_species=5).energy_shifts) == 5


def test_single_atoms(labelled):
    structures = [labelled(Atoms("H"), energy=-13.6, forces=np.zeros((1, 3)))]
    statistics = dataset_statistics(StructureDataset(structures, cutoff=5.0, dtype="float64"))
    assert statistics.energy_shifts == pytest.approx((-13.6,))
    assert statistics.avg_num_neighbors == 0 and statistics.force_rms == 0


def test_errors(molecules):
    dataset = StructureDataset(molecules, cutoff=2.5)
    with pytest.raises(ValueError, match="empty dataset"):
        dataset_statistics(Subset(dataset, []))
    with pytest.raises(ValueError, match="species index 2, num_species=2"):
        dataset_statistics(dataset, num_species=2)
    with pytest.raises(ValueError, match="2 reference energies of 3 species"):
        dataset_statistics(dataset, reference_energies=[1.0, None])


def test_missing_labels_are_left_out(labelled, molecules):
    water = Atoms("OH2", [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    unlabelled = dataset_statistics(StructureDataset([water], cutoff=2.5, require_labels=False))
    assert unlabelled.energy_shifts == (0.0, 0.0) and unlabelled.force_rms == unlabelled.energy_rms == 0.0
    options = {"cutoff": 2.5, "require_labels": False, "species": ["H", "C", "O"]}
    with_gaps = dataset_statistics(StructureDataset([water, *molecules], **options))
    without = dataset_statistics(StructureDataset(molecules, **options))
    assert with_gaps.energy_shifts == without.energy_shifts and with_gaps.force_rms == without.force_rms
    assert with_gaps.num_structures == without.num_structures + 1


def test_lone_atoms_do_not_count_beside_others(labelled, molecules):
    lone = labelled(Atoms("H"), energy=-1000.0, forces=np.zeros((1, 3)))
    expected = dataset_statistics(StructureDataset(molecules, cutoff=2.5))
    assert dataset_statistics(StructureDataset([lone, *molecules], cutoff=2.5)) == expected


def test_known_reference_energies(molecules):
    dataset = StructureDataset(molecules, cutoff=2.5)
    fitted = dataset_statistics(dataset).energy_shifts
    known = dataset_statistics(dataset, reference_energies=[-20.0, None, None]).energy_shifts
    assert known[0] == -20.0 and known[1:] != pytest.approx(fitted[1:], abs=1.0)
    exact = dataset_statistics(dataset, reference_energies=[fitted[0], None, None]).energy_shifts
    assert exact == pytest.approx(fitted, rel=1e-6)
