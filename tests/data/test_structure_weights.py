"""Weights of structures come from their ``config_type`` and their own numbers, and multiply their terms of the loss."""

from __future__ import annotations

import ase.io
import prediction_workers
import pytest
import structure_weight_workers as workers
import tiny
import torch

from lightning_januspipe.data import StructureDataset, collate_structures
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.models.losses import MaskedLoss, masked_loss
from lightning_januspipe.testing import RankPool

pytestmark = pytest.mark.filterwarnings("ignore")


def dataset(**options) -> StructureDataset:
    structures = prediction_workers.structures(5)
    structures[2].info["config_weight"] = 3.0
    return StructureDataset(structures, cutoff=5.0, species=["Cu", "Ni", "Al"], require_labels=False, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"config_type_weights": {"third": 5.0}}, [5.0, 1.0, 1.0, 5.0, 1.0]),
        ({"config_type_weights": workers.WEIGHTS}, [5.0, 0.5, 0.5, 5.0, 0.5]),
        ({"config_type_weights": {"Default": 0.5}}, [1.0, 0.5, 0.5, 1.0, 0.5]),
        ({"weight_key": "config_weight"}, [1.0, 1.0, 3.0, 1.0, 1.0]),
        ({"config_type_weights": workers.WEIGHTS, "weight_key": "config_weight"}, [5.0, 0.5, 1.5, 5.0, 0.5]),
    ],
)
def test_weights_of_samples(options: dict, expected: list[float]) -> None:
    data = dataset(**options)
    assert collate_structures([data[i] for i in range(5)])["weight"].tolist() == expected
    assert "weight" not in dataset()[0]


def test_loss(float64) -> None:
    """The mean over the labels of each quantity, of errors that have the weights of their structures."""
    data = dataset(config_type_weights=workers.WEIGHTS)
    batch = collate_structures([data[i] for i in range(5)])
    module: PotentialModule = tiny.module(num_layers=1)
    prediction = module(batch)
    weight, structure = batch["weight"], batch["batch"]
    known = ~batch["energy"].isnan()
    num_atoms = torch.bincount(structure)
    energy = (weight * ((prediction["energy"] - batch["energy"]) / num_atoms) ** 2)[known].mean()
    forces = (weight[structure, None] * (prediction["forces"] - batch["forces"]) ** 2)[known[structure]].mean()
    stress = (weight[:, None, None] * (prediction["stress"] - batch["stress"]) ** 2)[known].mean()
    torch.testing.assert_close(module.loss(prediction, batch), energy + forces + stress)
    bare = {name: value for name, value in batch.items() if name != "weight"}
    ones = bare | {"weight": torch.ones(5)}
    torch.testing.assert_close(module.loss(prediction, ones), module.loss(prediction, bare))


def test_loss_over_a_dataset() -> None:
    """The same whatever the batches are."""
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.rand(2, 6, 3, generator=generator).unbind()
    labels[1] = torch.nan
    weight = torch.arange(6.0)
    whole = masked_loss(values, labels, 0.1, weight)
    loss = MaskedLoss({"forces": 2.0}, 0.1)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        loss.update({"forces": (values[part], labels[part])}, {"forces": weight[part]})
    torch.testing.assert_close(loss.compute().float(), 2 * whole)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"config_type_weights has {'third': -1.0}"):
        dataset(config_type_weights={"third": -1.0})
    data = dataset(weight_key="config_type")
    with pytest.raises(ValueError, match="structure 0 has the weight 'third' under 'config_type'"):
        data[0]


def test_a_pipeline_trains_what_one_process_does(pool: RankPool, tmp_path) -> None:
    structures = prediction_workers.structures(4)
    structures[2].info["config_weight"] = 3.0
    file = str(tmp_path / "weights.extxyz")
    ase.io.write(file, structures)
    (expected,) = pool.run(workers.trained, None, file, workers.WEIGHTS, world_size=1)
    (other,) = pool.run(workers.trained, None, file, None, world_size=1)
    strategy = {"pipeline_size": 2, "num_microbatches": 1}
    for found in pool.run(workers.trained, strategy, file, workers.WEIGHTS, world_size=2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert (other["val_loss"] - expected["val_loss"]).abs() > 1e-3
