"""The loss has the weights of its epoch, in a pipeline and after resuming too."""

from __future__ import annotations

import loss_weight_workers as workers
import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_januspipe.callbacks import LossWeightSchedule
from lightning_januspipe.testing import RankPool, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Seen(Callback):
    """Keeps the weights of each training batch, and those of the validation loss."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, dict[str, float]]] = []
        self.validation: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.weights.append((trainer.current_epoch, dict(module.weights)))

    def on_validation_epoch_end(self, trainer, module) -> None:
        self.validation.append(dict(module.losses["val"].weights))


def test_weights_of_each_epoch_and_after_resuming(tmp_path, float64) -> None:
    expected = [
        {"energy": 1.0, "forces": 1.0, "stress": 1.0},
        {"energy": 50.0, "forces": 0.5, "stress": 1.0},
        {"energy": 50.0, "forces": 0.5, "stress": 30.0},
    ]
    seen, module = Seen(), tiny.module(num_layers=1)
    trainer = quiet_trainer(max_epochs=3, callbacks=[LossWeightSchedule(workers.SCHEDULE), seen])
    trainer.fit(module, tiny.data(num_train=2, batch_size=2))
    assert seen.weights == list(enumerate(expected))
    assert seen.validation == [expected[0]] * 3 and module.weights == expected[0]
    trainer.save_checkpoint(tmp_path / "three.ckpt")

    again = Seen()
    trainer = quiet_trainer(max_epochs=5, callbacks=[LossWeightSchedule(workers.SCHEDULE), again])
    trainer.fit(tiny.module(num_layers=1), tiny.data(num_train=2, batch_size=2), ckpt_path=tmp_path / "three.ckpt")
    assert again.weights == [(3, expected[2]), (4, expected[2])]


def test_a_pipeline_trains_what_one_process_does(pool: RankPool) -> None:
    (expected,) = pool.run(workers.trained, None, workers.SCHEDULE, world_size=1)
    (other,) = pool.run(workers.trained, None, None, world_size=1)
    strategy = {"pipeline_size": 2, "num_microbatches": 1}
    found = pool.run(workers.trained, strategy, workers.SCHEDULE, world_size=2)
    for parameters in found:
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-12)
    assert any((expected[name] - other[name]).abs().max() > 1e-5 for name in expected)


@pytest.mark.parametrize("schedule", [{}, {-1: {"energy": 1.0}}, {1: {"energy": -1.0}}])
def test_bad_schedules(schedule) -> None:
    with pytest.raises(ValueError, match="expected weights by epoch"):
        LossWeightSchedule(schedule)


@pytest.mark.parametrize(
    ("module", "schedule", "message"),
    [
        (tiny.module, {1: {"force": 1.0}}, r"names \['force'\]; the loss .* \['energy', 'forces', 'stress'\]"),
        (tiny.module, {1: {"energy": 0.0, "forces": 0.0, "stress": 0.0}}, "all weights are zero from epoch 1 on"),
        (LightningModule, {1: {"energy": 1.0}}, "LightningModule has no mapping 'weights'"),
    ],
)
def test_modules_that_do_not_fit(module, schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeightSchedule(schedule).on_fit_start(quiet_trainer(), module())
