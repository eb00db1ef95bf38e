from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.models import PotentialModule, initial_weights, saved_arguments
from lightning_januspipe.testing import quiet_trainer

LAYER = "potential.energy_model.layers.0."


@pytest.fixture
def batches(make_batch, make_structure) -> list:
    return [make_batch([make_structure(i)], labels=True) for i in range(2)]


def fitted(module: PotentialModule, batches: list, folder: Path, strategy="auto", **kwargs) -> Trainer:
    trainer = quiet_trainer(strategy, max_epochs=1, default_root_dir=folder)
    trainer.fit(module, DataLoader(batches, batch_size=None), **kwargs)
    return trainer


def weights_of(module: PotentialModule) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def saved(tmp_path, batches, make_potential):
    """A checkpoint file of a short run, and its weights."""
    module = PotentialModule(make_potential(), learning_rate=0.01)
    fitted(module, batches, tmp_path).save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt", weights_of(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["auto", "januspipe"])
def test_starts_from_weights_and_trains_what_is_not_frozen(tmp_path, batches, make_potential, saved, strategy) -> None:
    path, weights = saved
    torch.manual_seed(1)
    fresh = make_potential(species=["H", "O", "Cu", "Au"])
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    frozen = ["embedding", "layers.[01]"]
    module = PotentialModule(fresh, learning_rate=1e-4, initial_weights=str(path), frozen=frozen)
    optimizers = fitted(module, batches, tmp_path, strategy).optimizers

    for name, value in module.named_parameters():
        is_frozen = any(part in name for part in ("embedding", "layers.0.", "layers.1."))
        assert torch.equal(value, weights[name]) == is_frozen, name
        torch.testing.assert_close(value, weights[name], atol=3e-4, rtol=0)  # two steps from the saved ones
    assert [p.shape for g in optimizers[0].param_groups for p in g["params"]] == [
        p.shape for p in module.parameters() if p.requires_grad
    ]
    assert set(initial_weights.read_checkpoint(path)) >= {"optimizer_states", "state_dict", saved_arguments.ARGUMENTS}
    assert "initial_weights" not in module.hparams


@pytest.mark.filterwarnings("ignore")
def test_are_loaded_once_and_not_over_a_checkpoint(tmp_path, batches, make_potential, saved) -> None:
    path, weights = saved
    module = PotentialModule(make_potential(), initial_weights=str(path), learning_rate=0.1)
    trainer = fitted(module, batches, tmp_path)
    trained = weights_of(module)
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    torch.testing.assert_close(weights_of(module), trained, rtol=0, atol=0)

    again = PotentialModule(make_potential(), initial_weights=str(path))
    fitted(again, batches, tmp_path, ckpt_path=tmp_path / "more.ckpt")  # has no epoch left to train
    torch.testing.assert_close(weights_of(again), trained, rtol=0, atol=0)
    loaded = PotentialModule.load_from_checkpoint(tmp_path / "more.ckpt", potential=make_potential())
    fitted(loaded, batches, tmp_path, ckpt_path=tmp_path / "more.ckpt")
    torch.testing.assert_close(weights_of(loaded), trained, rtol=0, atol=0)
    assert any(not torch.equal(trained[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("ignore")
def test_from_a_folder(tmp_path, batches, make_potential) -> None:
    module = PotentialModule(make_potential(), learning_rate=0.01)
    strategy = JanusPipeStrategy(save_distributed_checkpoint=True)
    fitted(module, batches, tmp_path, strategy).save_checkpoint(tmp_path / "folder.ckpt")
    assert (tmp_path / "folder.ckpt").is_dir()
    other = PotentialModule(make_potential())
    initial_weights.load_weights(other, other.potential, tmp_path / "folder.ckpt")
    torch.testing.assert_close(weights_of(other), weights_of(module), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"species": ["H", "O", "Au", "Cu"]}, r"trained with species=\['H', 'O', 'Cu', 'Au'\], .* has species=\['H'"),
        ({"avg_num_neighbors": 7.0}, "avg_num_neighbors=6.0, .*avg_num_neighbors=7.0"),
        ({"num_layers": 2}, r"trained with num_layers=3, .* has num_layers=2"),
        ({"cutoff": 3.6}, r"cutoff=3.5, .*cutoff=3.6"),
        ({"cutoff_exponent": 5}, r"cutoff_exponent=6, .*Give it cutoff_exponent=6, for instance .*config.yaml"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_weights_of_another_model(make_potential, saved, options, message) -> None:
    module = PotentialModule(make_potential(**options))
    before = weights_of(module)
    with pytest.raises(ValueError, match=message):
        initial_weights.load_weights(module, module.potential, saved[0])
    torch.testing.assert_close(weights_of(module), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, r"missing in the model: potential\.energy_model\.layers\.1\..* and \d+ more"),
        ({"num_layers": 4}, r"missing in the checkpoint: .*potential\.energy_model\.layers\.3\."),
        ({"num_features": 8}, r"embedding.weight \(4, 6\) instead of \(4, 8\).*config.yaml"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_weights_of_other_names_and_shapes(make_potential, saved, options, message) -> None:
    checkpoint = torch.load(saved[0], weights_only=True)
    del checkpoint[saved_arguments.ARGUMENTS]  # as in a checkpoint of another potential
    torch.save(checkpoint, saved[0])
    module = PotentialModule(make_potential(**options))
    with pytest.raises(ValueError, match=message):
        initial_weights.load_weights(module, module.potential, saved[0])


def test_refuses_what_is_no_checkpoint(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none.ckpt"):
        initial_weights.read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        initial_weights.read_checkpoint(tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no entry 'state_dict'"):
        initial_weights.read_checkpoint(tmp_path / "weights.pt")
    torch.save({"state_dict": {}, "more": Trainer}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="other objects"):
        initial_weights.read_checkpoint(tmp_path / "objects.pt")


def test_patterns(make_potential) -> None:
    module = PotentialModule(make_potential(num_layers=11), frozen=["layers.1", "*.layers.3.*"])
    frozen = {name.split("layers.")[1].split(".")[0] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"1", "3"}
    with pytest.raises(
        ValueError,
        match=r"'layer.1' matches no parameter; expected .* such as energy_model\.embedding\.weight",
    ):
        PotentialModule(make_potential(), frozen=["layer.1"])
    with pytest.raises(ValueError, match="no parameter to train"):
        PotentialModule(make_potential(), frozen=["energy_model"])
    with pytest.raises(ValueError, match="expected a list"):
        PotentialModule(make_potential(), frozen="layers")
