from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from ase.build import fcc111, molecule
from ase.calculators.emt import EMT
from ase.io import read

from lightning_januspipe import keys
from lightning_januspipe.data import EMTDataModule, emt_structures, label_with_emt
from lightning_januspipe.data.emt import EMT_METALS, cubic_repeats


def test_labels_are_those_of_emt():
    module = EMTDataModule(12, 2, 2, cutoff=4.0, dtype="float64", seed=5)
    train = module.dataset("train")
    for index, atoms in enumerate(module.structures("train")):
        fresh = atoms.copy()
        fresh.calc = EMT()
        sample = train[index]
        assert sample[keys.ENERGY].item() == pytest.approx(fresh.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(sample[keys.FORCES].numpy(), fresh.get_forces(), atol=1e-10)
        np.testing.assert_allclose(sample[keys.STRESS][0].numpy(), fresh.get_stress(voigt=False), atol=1e-10)
        assert [module.species[s] for s in sample[keys.SPECIES]] == atoms.get_chemical_symbols()


def test_forces_and_stress_are_derivatives_of_the_energy():
    (atoms,) = emt_structures(1, sizes=(8,), rattle=0.2, vacancy_probability=1.0, seed=4)
    step = 1e-4

    def energy(change):
        moved = atoms.copy()
        change(moved)
        return label_with_emt(moved).get_potential_energy()

    def move(amount):
        def change(moved):
            moved.positions[2, 1] += amount

        return change

    def stretch(amount):
        def change(moved):
            strain = np.eye(3)
            strain[0, 1] = strain[1, 0] = amount / 2
            moved.set_cell(moved.cell.array @ strain, scale_atoms=True)

        return change

    force = -(energy(move(step)) - energy(move(-step))) / (2 * step)
    assert atoms.get_forces()[2, 1] == pytest.approx(force, abs=1e-5)
    stress = (energy(stretch(step)) - energy(stretch(-step))) / (2 * step) / atoms.get_volume()
    assert atoms.get_stress(voigt=False)[0, 1] == pytest.approx(stress, abs=1e-5)


def test_same_seed_same_data_whatever_the_global_state():
    np.random.seed(1)
    torch.manual_seed(1)
    first = EMTDataModule(6, 3, 3, seed=2)
    first.setup()
    np.random.seed(2)
    torch.manual_seed(2)
    second = EMTDataModule(6, 3, 3, seed=2)
    second.setup("test")
    for split in ("train", "val", "test"):
        a, b = first.dataset(split), second.dataset(split)
        assert len(a) == len(b) == {"train": 6}.get(split, 3)
        for index in range(len(a)):
            for name, tensor in a[index].items():
                torch.testing.assert_close(tensor, b[index][name], rtol=0, atol=0)


def test_splits_and_seeds_differ_and_sizes_do_not_matter():
    def energies(split, seed=0, **numbers):
        return [atoms.get_potential_energy() for atoms in EMTDataModule(seed=seed, **numbers).structures(split)]

    small = {"num_train": 3, "num_val": 3, "num_test": 3}
    train = energies("train", **small)
    assert len({*train, *energies("val", **small), *energies("test", **small), *energies("train", 1, **small)}) == 12
    assert energies("train", num_train=5, num_val=0)[:3] == train


def test_variety():
    structures = emt_structures(80, seed=0)
    sizes = {len(atoms) for atoms in structures}
    assert {4, 8, 16, 32} <= sizes and sizes & {7, 15, 31} and 3 not in sizes
    assert {len(set(atoms.symbols)) for atoms in structures} == {1, 2, 3}
    assert {symbol for atoms in structures for symbol in atoms.symbols} == {"Cu", "Ni", "Al"}
    assert all(atoms.pbc.all() for atoms in structures)
    angles = np.array([atoms.cell.angles() for atoms in structures])
    assert 0.5 < np.abs(angles - 90).max() < 6
    largest = [np.abs(atoms.get_forces()).max() for atoms in structures]
    assert 0.5 < np.median(largest) < 10 and max(largest) < 30
    for atoms in structures:
        distances = atoms.repeat(2).get_all_distances(mic=True)
        assert distances[distances > 0].min() > 1.5


def test_all_metals():
    for metal in EMT_METALS:
        (atoms,) = emt_structures(1, species=[metal], sizes=(4,), rattle=0.0, strain=0.0)
        assert np.abs(atoms.get_forces()).max() < 1e-10
        assert abs(atoms.get_potential_energy()) / 4 < 0.1  # EMT counts from the bulk at its lattice constant


def test_label_of_slab_and_molecule_has_no_stress():
    for atoms in (fcc111("Cu", (2, 2, 2), vacuum=5.0), molecule("H2O")):
        labelled = label_with_emt(atoms)
        assert set(labelled.calc.results) == {"energy", "forces"} and atoms.calc is None


def test_is_fast_enough():
    start = time.process_time()
    module = EMTDataModule(200, 0, 0)
    module.setup("fit")
    assert len(module.dataset("train")) == 200
    assert time.process_time() - start < 20  # about one second on an idle core


def test_loaders():
    module = EMTDataModule(10, 4, 2, batch_size=4, cutoff=4.0, dtype="float32")
    module.prepare_data()
    module.setup()
    assert [batch[keys.ENERGY].shape[0] for batch in module.train_dataloader()] == [4, 4, 2]
    (batch,) = module.val_dataloader()
    assert batch[keys.STRESS].shape == (4, 3, 3) and not batch[keys.STRESS].isnan().any()
    assert batch[keys.FORCES].dtype == torch.float32
    assert len(module.test_dataloader()) == len(module.predict_dataloader()) == 1
    assert EMTDataModule(1, 0, 0).val_dataloader() == []
    assert module.statistics().num_structures == 10 and len(module.statistics().energy_shifts) == 3


def test_writes_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silent = EMTDataModule(3, 2, 1)
    silent.prepare_data()
    silent.setup()
    assert list(tmp_path.iterdir()) == []
    module = EMTDataModule(3, 2, 1, save_dir="out")
    module.prepare_data()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.extxyz", "train.extxyz", "val.extxyz"]
    written = read(tmp_path / "out" / "train.extxyz", index=":")
    for atoms, original in zip(written, module.structures("train"), strict=True):
        assert atoms.get_potential_energy() == pytest.approx(original.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), original.get_stress(), atol=1e-6)


def test_repeats_are_as_cubic_as_possible():
    assert [sorted(cubic_repeats(n)) for n in (1, 2, 4, 8, 12, 27)] == [
        [1, 1, 1],
        [1, 1, 2],
        [1, 2, 2],
        [2, 2, 2],
        [2, 2, 3],
        [3, 3, 3],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"species": ["Fe", "Cu"]}, r"EMT has no fcc metal \['Fe'\]; expected species in"),
        ({"sizes": (4, 6)}, r"sizes=\[4, 6\]; expected numbers of atoms that are multiples of 4"),
        ({"sizes": ()}, r"sizes=\[\]"),
        ({"rattle": -0.1}, "rattle=-0.1"),
        ({"strain": 0.9}, "strain=0.9"),
        ({"vacancy_probability": 2.0}, "vacancy_probability=2.0"),
        ({"num_train": 0}, "num_train=0"),
        ({"num_val": -1}, "num_val=-1"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        EMTDataModule(**options)
