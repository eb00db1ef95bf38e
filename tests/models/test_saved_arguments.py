from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ase import Atoms
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Subset

import lightning_januspipe
from lightning_januspipe import JanusPipeStrategy, keys
from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
from lightning_januspipe.deploy import standalone
from lightning_januspipe.models import EquivariantPotential, PotentialModule, data_checks, describe, saved_arguments
from lightning_januspipe.testing import quiet_trainer

SPECIES = ["Al", "Ni", "Cu"]

pytestmark = pytest.mark.filterwarnings("ignore")


def make_potential(**options) -> EquivariantPotential:
    torch.manual_seed(0)
    arguments = {"num_layers": 2, "num_features": 4, "radial_hidden": [4], "num_bessel": 4, "avg_num_neighbors": 20.0}
    return EquivariantPotential(**{"species": SPECIES, "cutoff": 4.0, **arguments, **options})


def make_loader(species=SPECIES, cutoff=4.0, **options) -> DataLoader:
    dataset = StructureDataset(emt_structures(3, sizes=(4,)), cutoff=cutoff, species=species)
    return DataLoader(Subset(dataset, [2, 0]), batch_size=2, collate_fn=collate_structures, **options)


@pytest.fixture(params=["file", "folder"])
def trained(request, tmp_path):
    """Path of a checkpoint, and the module that it was saved from."""
    strategy = JanusPipeStrategy(save_distributed_checkpoint=True) if request.param == "folder" else "auto"
    module = PotentialModule(make_potential(per_species_shift=[-6600.789, -41400.456, -45000.123]), learning_rate=0.01)
    trainer = quiet_trainer(strategy, default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert (tmp_path / "trained.ckpt").is_dir() == (request.param == "folder")
    return tmp_path / "trained.ckpt", module.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"species": ["Cu", "Ni", "Al"]},
            r"trained with species=\['Al', 'Ni', 'Cu'\], .*has species=\['Cu', 'Ni",
        ),
        ({"species": ["Ag", "Pd", "Au"]}, r"has species=\['Ag', 'Pd', 'Au'\]"),
        ({"cutoff": 5.0}, "trained with cutoff=4.0, .*has cutoff=5.0.*Give it cutoff=4.0"),
        ({"cutoff_exponent": 5}, "trained with cutoff_exponent=6"),
    ],
)
@pytest.mark.parametrize("way", ["fit", "validate", "test", "predict", "load", "initial_weights"])
def test_checkpoint_of_another_potential_is_refused(trained, tmp_path, way, options, message) -> None:
    path, _ = trained
    other = make_potential(**options)
    loader = make_loader(options.get("species", SPECIES), options.get("cutoff", 4.0))
    if options.get("species", SPECIES)[0] == "Ag":
        loader = make_loader()  # the checkpoint is looked at before the data
    trainer = quiet_trainer("januspipe", devices=1, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=message):
        if way == "load":
            PotentialModule.load_from_checkpoint(path, potential=other)
        elif way == "initial_weights":
            trainer.fit(PotentialModule(other, initial_weights=str(path)), loader)
        else:
            getattr(trainer, way)(PotentialModule(other), loader, ckpt_path=path, weights_only=False)


def test_is_loaded_from_the_path_alone(trained) -> None:
    path, module = trained
    (batch,) = make_loader()
    loaded = PotentialModule.load_from_checkpoint(path)
    assert not loaded.training and loaded.hparams["learning_rate"] == 0.01
    assert loaded.potential.arguments == module.potential.arguments
    torch.testing.assert_close(loaded(batch), module(batch), rtol=0, atol=0)
    again = PotentialModule.load_from_checkpoint(path, learning_rate=0.5)
    assert again.hparams["learning_rate"] == 0.5


def test_float64_is_loaded_as_float64(tmp_path) -> None:
    module = PotentialModule(make_potential().double())
    saved = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0", "hyper_parameters": {}}
    module.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "double.ckpt")
    loaded = PotentialModule.load_from_checkpoint(tmp_path / "double.ckpt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_other_potentials_are_not_built_from_a_file(tmp_path) -> None:
    class Mine(EquivariantPotential):
        pass

    module = PotentialModule(Mine(SPECIES, 4.0, num_layers=1, num_features=2))
    saved = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0"}
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"old.ckpt does not say which .*load_from_checkpoint\(path, pot"):
        PotentialModule.load_from_checkpoint(tmp_path / "old.ckpt")
    module.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"mine.ckpt belongs to a potential .*Mine, which cannot be built"):
        PotentialModule.load_from_checkpoint(tmp_path / "mine.ckpt")
    saved[saved_arguments.CLASS] = "os.system"
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"belongs to a potential os.system"):
        PotentialModule.load_from_checkpoint(tmp_path / "bad.ckpt")


def test_weights_replace_shifts_and_this_is_said(trained) -> None:
    path, _ = trained
    with pytest.warns(UserWarning, match=r"per_species_shift=\[0.0, 0.0, 0.0\] is replaced by the weights in"):
        loaded = PotentialModule.load_from_checkpoint(path, potential=make_potential())
    assert loaded.potential.energy_model.shift.tolist() == [-6600.789, -41400.456, -45000.123]


@pytest.mark.parametrize("way", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"species": ["Cu", "Ni", "Al"]},
            r"data has the species \['Cu', 'Ni', 'Al'\].*species=\['Al', 'Ni'",
        ),
        (
            {"cutoff": 3.5},
            r"neighbour lists with cutoff=3.5 Å.*has cutoff=4.0 Å.*Give the data cutoff=4.0",
        ),
    ],
)
def test_data_that_does_not_fit_the_potential_is_refused(tmp_path, way, options, message) -> None:
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=message):
        getattr(trainer, way)(PotentialModule(make_potential()), make_loader(**options))


def test_data_module_that_does_not_fit_the_potential_is_refused(tmp_path) -> None:
    class Data(LightningDataModule):
        species = ("Al", "Ni")

        def train_dataloader(self):
            return make_loader()

    data_checks.check_data(make_potential(), Data())  # the first species of the potential
    Data.species = ("Ni", "Al")
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"data has the species \['Ni', 'Al'\].*species=\['Al', 'Ni', 'Cu'"):
        trainer.fit(PotentialModule(make_potential()), Data())


def test_shifts_keep_their_digits() -> None:
    shifts = [-6600.789, -41400.456, -45000.123]
    potential = make_potential(per_species_shift=shifts)
    for convert in ("float", "half", "bfloat16", "double"):
        getattr(potential, convert)()
        assert potential.energy_model.shift.tolist() == shifts, convert
    potential = make_potential(per_species_shift=shifts)
    rounded = {name: value.float() for name, value in potential.state_dict().items()}
    potential.load_state_dict(rounded)
    assert potential.energy_model.shift.tolist() == shifts
    other = make_potential()
    other.load_state_dict(rounded)
    assert other.energy_model.shift.tolist() == torch.tensor(shifts).tolist()

    (sample,) = [StructureDataset([Atoms("Cu")], cutoff=4.0, species=SPECIES, require_labels=False)[0]]
    alone = make_potential(per_species_shift=shifts).eval()(sample)[keys.ENERGY]
    assert alone.item() - shifts[2] == pytest.approx(make_potential().eval()(sample)[keys.ENERGY].item(), abs=1e-9)


def test_load_needs_the_path_alone(trained) -> None:
    path, module = trained
    (batch,) = make_loader()
    loaded = lightning_januspipe.load(path)
    assert type(loaded) is PotentialModule and not loaded.training
    torch.testing.assert_close(loaded(batch), module(batch), rtol=0, atol=0)


def test_the_checkpoint_describes_its_potential(trained) -> None:
    path, module = trained
    facts = describe(path)
    assert facts["class"].endswith("EquivariantPotential") and facts["arguments"] == module.potential.arguments
    assert facts["species"] == SPECIES and facts["cutoff"] == 4.0
    assert facts["energies_of_atoms"] == dict(zip(SPECIES, [-6600.789, -41400.456, -45000.123], strict=True))
    assert facts["units"] == {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å³"}
    assert facts["versions"]["lightning_januspipe"] == lightning_januspipe.__version__
    assert facts["versions"]["torch"] == torch.__version__ and facts["global_step"] == 1
    assert facts["num_weights"] == sum(value.numel() for value in module.state_dict().values())


class OtherModule(LightningModule):
    """A module as other packages have them, with an object among its hyper-parameters."""

    def __init__(self, width: int, where: Path) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)


def test_load_takes_the_class_of_another_package(tmp_path) -> None:
    module = OtherModule(3, Path("somewhere"))
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"If you trust .* weights_only=False"):
        lightning_januspipe.load(tmp_path / "other.ckpt", OtherModule)
    loaded = lightning_januspipe.load(tmp_path / "other.ckpt", OtherModule, weights_only=False)
    assert loaded.hparams["where"] == Path("somewhere") and not loaded.training
    torch.testing.assert_close(loaded.layer.weight, module.layer.weight)
    with pytest.raises(TypeError, match=r"module_class='torch.nn.Linear' has no load_from_checkpoint"):
        lightning_januspipe.load(tmp_path / "other.ckpt", "torch.nn.Linear")


@pytest.mark.parametrize("name", ["loading.load", "lightning_module.PotentialModule", "conservative.cell_volume"])
def test_a_file_names_no_function_that_loading_calls(tmp_path, name) -> None:
    saved = {"state_dict": {}, saved_arguments.CLASS: f"lightning_januspipe.models.{name}"}
    torch.save(saved | {saved_arguments.ARGUMENTS: {"path": "x"}}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="belongs to a potential"):
        lightning_januspipe.load(tmp_path / "bad.ckpt")


def test_averages_are_validated_and_loaded(tmp_path) -> None:
    """With Lightning's callback: a checkpoint holds the averages, whose error is the one that was logged."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks", reason="Lightning 2.6")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning 2.5 has no EMAWeightAveraging")
    module = PotentialModule(make_potential(), learning_rate=0.05)
    average = callbacks.EMAWeightAveraging(decay=0.5)
    save = callbacks.ModelCheckpoint(dirpath=tmp_path, filename="averaged")
    trainer = quiet_trainer(max_epochs=3, callbacks=[average, save], enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader())
    logged = float(trainer.callback_metrics["val_forces_mae"])

    loaded = lightning_januspipe.load(tmp_path / "averaged.ckpt")
    found = quiet_trainer().validate(loaded, make_loader(), verbose=False)[0]["val_forces_mae"]
    assert found == pytest.approx(logged, rel=1e-5)
    state = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    last = state["current_model_state"]
    assert any(not torch.equal(state["state_dict"][name], value) for name, value in last.items())
    exported = standalone.potential_of(tmp_path / "averaged.ckpt")[0].state_dict()
    assert all(torch.equal(value, state["state_dict"][f"potential.{name}"]) for name, value in exported.items())
