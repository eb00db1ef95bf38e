from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ase import Atoms
from ase.io import write
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_januspipe import keys
from lightning_januspipe.data import ASEDataModule, EMTDataModule, StructureDataModule, emt_structures, split_indices
from lightning_januspipe.testing import quiet_trainer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.extxyz", emt_structures(20, sizes=(4, 8), seed=0))
    write(folder / "val.extxyz", emt_structures(5, sizes=(4,), seed=1))
    write(folder / "unlabelled.extxyz", [Atoms("Cu"), Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])])
    return {path.stem: str(path) for path in folder.iterdir()}


def energies(loader):
    return [energy for batch in loader for energy in batch[keys.ENERGY].tolist()]


def test_loaders_cover_the_splits_once(files):
    module = ASEDataModule(files["train"], val_size=0.2, test_size=3, cutoff=3.0, batch_size=4, dtype="float64")
    module.setup()
    everything = sorted(atoms.get_potential_energy() for atoms in emt_structures(20, sizes=(4, 8), seed=0))
    train, val, test = (
        energies(loader()) for loader in (module.train_dataloader, module.val_dataloader, module.test_dataloader)
    )
    assert [len(train), len(val), len(test)] == [13, 4, 3]
    assert sorted(train + val + test) == pytest.approx(everything, abs=1e-6)
    assert energies(module.predict_dataloader()) == test
    batch = next(iter(module.train_dataloader()))
    assert batch[keys.ENERGY].shape == (4,) and batch[keys.BATCH].max() == 3
    assert batch[keys.POSITIONS].dtype == torch.float64
    assert module.species == ["Al", "Ni", "Cu"]


def test_same_split_in_every_process(files):
    make = lambda seed: ASEDataModule(files["train"], val_size=5, cutoff=3.0, seed=seed)  # noqa: E731
    torch.manual_seed(1)
    first = make(7)
    first.setup("fit")
    torch.manual_seed(2)
    second = make(7)
    second.setup("validate")  # another order of use
    assert energies(first.val_dataloader()) == energies(second.val_dataloader())
    assert energies(first.val_dataloader()) != energies(make(8).val_dataloader())


def test_shuffling_is_left_to_the_sampler(files):
    module = ASEDataModule(files["train"], val_size=5, cutoff=3.0, batch_size=4, drop_last=True)
    train, val = module.train_dataloader(), module.val_dataloader()
    assert isinstance(train.sampler, RandomSampler) and train.generator is None and train.sampler.generator is None
    assert isinstance(val.sampler, SequentialSampler)
    assert len(train) == 3 and len(val) == 2  # only training drops an incomplete batch
    assert isinstance(ASEDataModule(files["train"], shuffle=False).train_dataloader().sampler, SequentialSampler)


def test_files_for_each_split(files):
    module = ASEDataModule(
        files["train"], val_file=files["val"], test_file=files["val"], predict_file=files["unlabelled"], cutoff=3.0
    )
    assert len(energies(module.train_dataloader())) == 20
    assert energies(module.val_dataloader()) == energies(module.test_dataloader())
    assert len(energies(module.val_dataloader())) == 5
    (batch,) = module.predict_dataloader()
    assert batch[keys.ENERGY].isnan().all()
    assert batch[keys.SPECIES].tolist() == [2, 2, 2]  # by the species of the training file
    assert batch[keys.EDGE_INDEX].tolist() == [[2, 1], [1, 2]]


def test_absent_splits_have_no_batches(files):
    module = ASEDataModule(files["train"])
    module.setup()
    assert module.val_dataloader() == module.test_dataloader() == module.predict_dataloader() == []


def test_setup_reads_only_what_the_stage_needs(files):
    module = ASEDataModule("absent.extxyz", test_file=files["val"], species=["Cu", "Ni", "Al"], cutoff=3.0)
    module.setup("test")
    assert len(energies(module.test_dataloader())) == 5
    with pytest.raises(ValueError, match=r"no such data file: absent\.extxyz"):
        module.setup("fit")


def test_worker_processes_give_the_same_batches(files):
    options = {"cutoff": 3.0, "shuffle": False, "batch_size": 4}
    alone, shared = ASEDataModule(files["train"], **options), ASEDataModule(files["train"], num_workers=2, **options)
    for a, b in zip(alone.train_dataloader(), shared.train_dataloader(), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], equal_nan=True)


def test_statistics_of_the_training_split(files):
    module = ASEDataModule(files["train"], train_size=6, val_size=4, cutoff=3.0, species=["Cu", "Ag", "Ni", "Al"])
    statistics = module.statistics()
    assert statistics.num_structures == 6 and len(statistics.energy_shifts) == 4 and statistics.energy_shifts[1] == 0
    assert module.statistics() is statistics


def test_lightning_runs_it(files):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))
            self.seen = {"train": 0, "val": 0}

        def training_step(self, batch, batch_idx):
            self.seen["train"] += len(batch[keys.ENERGY])
            return (self.scale * batch[keys.POSITIONS] - batch[keys.FORCES]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.seen["val"] += len(batch[keys.ENERGY])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def fit(datamodule):
        model = Model()
        quiet_trainer(max_epochs=1).fit(model, datamodule=datamodule)
        return model.seen

    assert fit(ASEDataModule(files["train"], val_size=5, cutoff=3.0, batch_size=4)) == {"train": 15, "val": 5}
    assert fit(ASEDataModule(files["train"], cutoff=3.0, batch_size=4)) == {"train": 20, "val": 0}


def test_split_indices():
    split = split_indices(10, val=0.25, test=3, seed=1)
    assert [len(split[name]) for name in ("train", "val", "test")] == [5, 2, 3]
    assert sorted(split["train"] + split["val"] + split["test"]) == list(range(10))
    smaller = split_indices(10, train=2, val=0.25, test=3, seed=1)
    assert smaller["val"] == split["val"] and smaller["test"] == split["test"]
    assert set(smaller["train"]) < set(split["train"])
    assert split_indices(10, val=5, seed=1) != split_indices(10, val=5, seed=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val": 10}, r"cannot split 10 structures .* 0 \+ 10 \+ 0"),
        ({"val": 6, "test": 6}, r"cannot split 10 structures .* 0 \+ 6 \+ 6"),
        ({"train": 8, "val": 2, "test": 1}, r"8 \+ 2 \+ 1 must not be more than 10"),
        ({"val": 1.0}, "val=1.0; expected a number of structures .int. or a fraction below 1"),
        ({"test": -1}, "test=-1"),
        ({"train": True}, "train=True"),
    ],
)
def test_split_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        split_indices(10, **sizes)


def test_option_errors(files):
    for options, message in (
        ({"val_file": "a.xyz", "val_size": 3}, "val_file='a.xyz' and val_size=3 are both given.* --data.val_size null"),
        ({"test_size": 1.5}, "test_size=1.5"),
        ({"train_size": 1.0}, "train_size=1.0 may be one structure or all of them"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"species": ["Qq"]}, "Qq"),
    ):
        with pytest.raises(ValueError, match=message):
            ASEDataModule(files["train"], **options)


def test_numbers_that_a_command_line_reads_as_floats(files):
    """``Optional[Union[int, float]]`` is the union that another package has named with the float first."""
    module = ASEDataModule(files["train"], train_size=3.0, val_size=1.0, test_size=2.0, cutoff=3.0)
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [3, 1, 2]


def test_base_class_is_abstract():
    module = StructureDataModule(batch_size=1)
    with pytest.raises(NotImplementedError):
        module.setup()


def test_configured_from_yaml(tmp_path, files):
    """Both modules can be made by LightningCLI's parser."""
    jsonargparse = pytest.importorskip("jsonargparse")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"ase:\n  train_file: {files['train']}\n  val_size: 0.2\n  test_size: 3\n  species: [Cu, Ni, Al]\n  cutoff: 3\n"
        "emt:\n  num_train: 3\n  species: [Cu, Au]\n  sizes: [4]\n  dtype: float64\n"
    )
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(ASEDataModule, "ase")
    parser.add_class_arguments(EMTDataModule, "emt")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    made = instantiate(parser.parse_path(str(config)))
    assert [len(made.ase.dataset(split)) for split in ("train", "val", "test")] == [13, 4, 3]
    assert made.emt.species == ["Cu", "Au"] and made.emt.dataset("train")[0][keys.FORCES].dtype == torch.float64
    defaults = instantiate(parser.parse_args([f"--ase.train_file={files['train']}"]))
    assert defaults.ase.species == ["Al", "Ni", "Cu"] and defaults.emt.species == ["Cu", "Ni", "Al"]


def test_without_the_lightning_package():
    pytest.importorskip("pytorch_lightning")
    program = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "import pytorch_lightning as pl\n"
        "from lightning_januspipe.data import EMTDataModule\n"
        "assert issubclass(EMTDataModule, pl.LightningDataModule)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
