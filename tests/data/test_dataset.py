from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.db import connect
from ase.io import read, write

from lightning_januspipe import keys
from lightning_januspipe.data import StructureDataset, emt_structures


@pytest.fixture(scope="module")
def alloys():
    return emt_structures(5, sizes=(4, 8), seed=3)


def assert_same_samples(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6, equal_nan=True)


def samples_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


def test_water_file(reference_file):
    dataset = StructureDataset(reference_file("water.extxyz"), cutoff=3.0, dtype="float64")
    assert len(dataset) == 128 and dataset.species == ["H", "O"]
    sample = dataset[0]
    assert sample[keys.ENERGY].item() == -29943.90625
    assert sample[keys.POSITIONS][0].tolist() == [7.53878593, 2.05621004, 4.5207386]
    assert sample[keys.FORCES][0].tolist() == [0.62199688, 0.18400981, -0.04290577]
    torch.testing.assert_close(sample[keys.CELL][0], torch.eye(3).double() * 12.444661140441895, rtol=0, atol=0)
    assert sample[keys.SPECIES].bincount().tolist() == [128, 64] and sample[keys.SPECIES][0] == 1
    assert sample[keys.PBC].all() and sample[keys.STRESS].isnan().all()
    j, i = sample[keys.EDGE_INDEX]
    vectors = sample[keys.POSITIONS][j] + sample[keys.CELL_SHIFTS] @ sample[keys.CELL][0] - sample[keys.POSITIONS][i]
    assert vectors.norm(dim=1).max() < 3.0
    # Two O-H bonds per water molecule.
    bonds = (vectors.norm(dim=1) < 1.3) & (sample[keys.SPECIES][i] == 1) & (sample[keys.SPECIES][j] == 0)
    assert i[bonds].bincount(minlength=192)[:64].unique().tolist() == [2]


def test_ethanol_file(reference_file):
    dataset = StructureDataset(reference_file("ethanol.extxyz"), cutoff=20.0, dtype="float64", precompute=True)
    assert len(dataset) == 100 and dataset.species == ["H", "C", "O"]
    sample = dataset[1]
    assert sample[keys.ENERGY].item() == -4209.406657143299
    assert sample[keys.FORCES][0].tolist() == [-1.20460343, -0.69628354, 0.02025582]
    assert sample[keys.ATOMIC_NUMBERS].tolist() == [1] * 6 + [6, 6, 8]
    assert (sample[keys.CELL] == 0).all() and not sample[keys.PBC].any()
    assert sample[keys.EDGE_INDEX].shape == (2, 9 * 8) and (sample[keys.CELL_SHIFTS] == 0).all()


def test_extxyz_round_trip(tmp_path, alloys):
    write(tmp_path / "alloys.extxyz", alloys)
    from_list = StructureDataset(alloys, cutoff=4.0, dtype="float64")
    from_file = StructureDataset(tmp_path / "alloys.extxyz", cutoff=4.0, dtype="float64")
    assert from_list.species == from_file.species
    assert_same_samples(samples_of(from_list), samples_of(from_file))
    assert not from_file[0][keys.STRESS].isnan().any()


def test_database_round_trip(tmp_path, alloys):
    with connect(tmp_path / "alloys.db") as database:
        for atoms in alloys:
            database.write(atoms)
    from_file = StructureDataset(str(tmp_path / "alloys.db"), cutoff=4.0, dtype="float64")
    assert_same_samples(samples_of(StructureDataset(alloys, cutoff=4.0, dtype="float64")), samples_of(from_file))


def test_database_with_own_keys(tmp_path):
    water = molecule("H2O")
    forces = np.arange(9.0).reshape(3, 3)
    with connect(tmp_path / "own.db") as database:
        database.write(water, key_value_pairs={"dft_energy": -3.5}, data={"dft_forces": forces})
    dataset = StructureDataset(
        tmp_path / "own.db", cutoff=3.0, energy_key="dft_energy", forces_key="dft_forces", dtype="float64"
    )
    assert dataset[0][keys.ENERGY].item() == -3.5
    np.testing.assert_array_equal(dataset[0][keys.FORCES].numpy(), forces)


def test_empty_database(tmp_path):
    with connect(tmp_path / "empty.db") as database:
        database.write(Atoms("H"))
    with connect(tmp_path / "empty.db") as database:
        database.delete([1])
    with pytest.raises(ValueError, match=r"empty\.db holds no structure"):
        StructureDataset(tmp_path / "empty.db", cutoff=3.0)


def test_other_format(tmp_path, alloys):
    write(tmp_path / "alloys.traj", alloys)
    assert_same_samples(
        samples_of(StructureDataset(tmp_path / "alloys.traj", cutoff=4.0)),
        samples_of(StructureDataset(alloys, cutoff=4.0)),
    )


def test_species_order_and_auto(alloys):
    assert StructureDataset([bulk("Ni"), molecule("H2O")], cutoff=3.0).species == ["H", "O", "Ni"]
    dataset = StructureDataset(alloys, cutoff=3.0, species=["Ni", "Al", "Cu"])
    for index, atoms in enumerate(alloys):
        assert [dataset.species[s] for s in dataset[index][keys.SPECIES]] == atoms.get_chemical_symbols()


def test_default_dtype_at_construction(alloys):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        dataset = StructureDataset(alloys, cutoff=3.0)
    finally:
        torch.set_default_dtype(before)
    assert dataset[0][keys.POSITIONS].dtype == dataset.dtype == torch.float64
    assert StructureDataset(alloys, cutoff=3.0, dtype="float32")[0][keys.FORCES].dtype == torch.float32


def test_samples_are_kept_and_made_lazily(monkeypatch, alloys):
    from lightning_januspipe.data import sample_cache as module

    calls = []
    make = module.structure_arrays
    monkeypatch.setattr(module, "structure_arrays", lambda *args, **kw: calls.append(kw["source"]) or make(*args, **kw))
    lazy = StructureDataset(alloys, cutoff=3.0)
    assert calls == []
    first, again = lazy[2], lazy[-3]
    assert calls == ["structure 2"]
    assert first is not again and first[keys.POSITIONS] is again[keys.POSITIONS]
    first.clear()  # a caller's changes of the dict stay its own
    assert lazy[2].keys() == again.keys()
    StructureDataset(alloys, cutoff=3.0, precompute=True)
    assert len(calls) == 1 + len(alloys)
    assert pickle.loads(pickle.dumps(lazy))[2].keys() == again.keys()


def test_index_out_of_range_ends_iteration(alloys):
    dataset = StructureDataset(alloys, cutoff=3.0)
    with pytest.raises(IndexError, match="structure 5 of a dataset of 5"):
        dataset[5]
    with pytest.raises(IndexError):
        dataset[-6]


def test_errors_name_file_and_frame(tmp_path, alloys):
    path = tmp_path / "mixed.extxyz"
    write(path, [alloys[0], molecule("H2O")])
    dataset = StructureDataset(path, cutoff=3.0)
    assert read(path, index=1).calc is None
    dataset[0]
    with pytest.raises(ValueError, match=r"mixed\.extxyz, frame 1 has no energy label"):
        dataset[1]
    with pytest.raises(ValueError, match=r"mixed\.extxyz, frame 1 has no energy label"):
        StructureDataset(path, cutoff=3.0, precompute=True)
    with pytest.raises(ValueError, match=r"mixed\.extxyz, frame 1 holds the unknown species H, O; known: \['Cu', 'Ni'"):
        StructureDataset(path, cutoff=3.0, species=["Cu", "Ni", "Al"], require_labels=False)[1]


def test_empty_list_and_cutoff(alloys):
    with pytest.raises(ValueError, match="the dataset is empty"):
        StructureDataset([], cutoff=3.0)
    with pytest.raises(ValueError, match="cutoff=-1 Å"):
        StructureDataset(alloys, cutoff=-1)
