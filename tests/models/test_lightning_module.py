import doctest
import importlib
import sys

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_januspipe import keys, models
from lightning_januspipe.models import PotentialModule, lightning_module
from lightning_januspipe.testing import quiet_trainer


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def make_loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


@pytest.fixture
def batches(make_batch, make_structure) -> list:
    return [make_batch([make_structure(3 * i + j) for j in range(3)], labels=True) for i in range(2)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "cosine", "stress_weight": 10.0},
        {"lr_scheduler": "plateau", "loss": "huber", "optimizer": "adamw", "weight_decay": 1e-4},
    ],
)
def test_fit_lowers_the_loss(tmp_path, batches, make_potential, options) -> None:
    module = PotentialModule(make_potential(), learning_rate=0.01, **options)
    losses = Losses()
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=15, callbacks=[losses])
    trainer.fit(module, make_loader(batches), make_loader(batches))
    assert len(losses.values) == 30
    assert sum(losses.values[-4:]) < 0.5 * sum(losses.values[:4])
    logged = trainer.callback_metrics
    for stage in ("train", "val"):
        for quantity in ("energy", "forces", "stress"):
            for error in ("mae", "rmse"):
                assert logged[f"{stage}_{quantity}_{error}"].isfinite()
    assert {"train_loss", "val_loss"} <= set(logged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_under_inference_mode(tmp_path, batches, make_potential, inference_mode: bool) -> None:
    module = PotentialModule(make_potential(), stress_weight=1.0)
    trainer = quiet_trainer(default_root_dir=tmp_path, inference_mode=inference_mode)
    (logged,) = trainer.test(module, make_loader(batches), verbose=False)
    predictions = trainer.predict(module, make_loader(batches))
    assert predictions is not None

    expected = [module.potential.eval()(batch) for batch in batches]
    errors = torch.cat([(p["forces"] - b["forces"]).flatten() for p, b in zip(expected, batches, strict=True)])
    assert logged["test_forces_mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)
    assert logged["test_forces_rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    per_atom = torch.cat(
        [(p["energy"] - b["energy"]) / torch.bincount(b["batch"]) for p, b in zip(expected, batches, strict=True)]
    )
    assert logged["test_energy_mae"] == pytest.approx(per_atom.abs().mean().item(), rel=1e-5)
    for prediction, reference in zip(predictions, expected, strict=True):
        torch.testing.assert_close(prediction, reference)


@pytest.mark.filterwarnings("ignore")
def test_fit_validates_under_inference_mode(tmp_path, batches, make_potential) -> None:
    module = PotentialModule(make_potential())
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(module, make_loader(batches), make_loader(batches))
    assert trainer.callback_metrics["val_loss"].isfinite()


def test_loss_by_hand(batches, make_potential) -> None:
    batch = batches[0]
    assert batch[keys.STRESS][1].isnan().all()
    module = PotentialModule(make_potential(), energy_weight=2.0, force_weight=3.0, stress_weight=4.0)
    prediction = module(batch)
    counts = torch.bincount(batch[keys.BATCH])
    energy = ((prediction["energy"] - batch["energy"]) / counts).square().mean()
    forces = (prediction["forces"] - batch["forces"]).square().mean()
    stress = (prediction["stress"] - batch["stress"])[[0, 2]].square().mean()
    torch.testing.assert_close(module.loss(prediction, batch), 2 * energy.float() + 3 * forces + 4 * stress)
    module.loss(prediction, batch).backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision(batches, make_potential) -> None:
    module = PotentialModule(make_potential(), stress_weight=1.0)
    reference = module.training_step(batches[0], 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module.training_step(batches[0], 0)
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_falls_back_to_pytorch_lightning(monkeypatch) -> None:
    namespace = pytest.importorskip("pytorch_lightning")
    name = lightning_module.__name__
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(models, "lightning_module", lightning_module)  # put back after the second import
    assert issubclass(importlib.import_module(name).PotentialModule, namespace.LightningModule)


@pytest.mark.filterwarnings("ignore")
def test_recipe_builds_the_module() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--model", type=PotentialModule)
    potential = {
        "class_path": "lightning_januspipe.models.EquivariantPotential",
        "init_args": {"species": ["Cu", "Au"], "cutoff": 5.0, "per_species_shift": {"Cu": 1.0, "Au": -2.0}},
    }
    config = {
        "class_path": "lightning_januspipe.models.PotentialModule",
        "init_args": {"potential": potential, "lr_scheduler": "plateau"},
    }
    module = parser.instantiate_classes(parser.parse_object({"model": config})).model
    assert module.potential.energy_model.shift.tolist() == [1.0, -2.0]
    assert module.hparams["lr_scheduler"] == "plateau"


def test_missing_labels(batches, make_potential) -> None:
    batch = {name: value for name, value in batches[0].items() if name != keys.STRESS}
    prediction = PotentialModule(make_potential())(batch)
    assert PotentialModule(make_potential()).loss(prediction, batch).isfinite()
    with pytest.raises(ValueError, match="no label.*stress"):
        PotentialModule(make_potential(), stress_weight=1.0).loss(prediction, batch)


@pytest.mark.parametrize(
    "options",
    [{"loss": "l3"}, {"optimizer": "sgd"}, {"lr_scheduler": "step"}, {"energy_weight": -1.0}]
    + [{"energy_weight": 0.0, "force_weight": 0.0}],
)
def test_rejects(make_potential, options) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=|loss weights .*expected none to be negative"):
        PotentialModule(make_potential(), **options)


def test_docstring_examples() -> None:
    result = doctest.testmod(lightning_module)
    assert result.attempted
    assert not result.failed
