"""Whether a training is long enough to pay for compiling, and how long it is going to be."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import tiny
from lightning.pytorch.callbacks import Timer

from lightning_januspipe.runtime.training_length import TrainingLength, reason_not_to_compile
from lightning_januspipe.strategy.contexts import training_length
from lightning_januspipe.testing import quiet_trainer


@pytest.mark.parametrize(
    ("length", "pays"),
    [
        (TrainingLength(), True),
        (TrainingLength(num_batches=1e6), True),
        (TrainingLength(num_batches=100), False),
        (TrainingLength(seconds=60.0), False),
        (TrainingLength(num_batches=1e6, seconds=60.0), False),
    ],
)
def test_short_trainings_do_not_compile(length: TrainingLength, pays: bool) -> None:
    reason = reason_not_to_compile(length, step_time=0.1, num_operations=[100, 200])
    assert ("training is planned for about" in reason) is not pays


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({"max_epochs": 4}, 12.0),  # 20 structures in batches of 8
        ({"max_epochs": 4, "limit_train_batches": 2}, 8.0),
        ({"max_steps": 2, "accumulate_grad_batches": 3}, 6.0),
        ({"max_epochs": -1}, math.inf),
    ],
)
def test_what_the_limits_of_a_trainer_leave(arguments: dict[str, int], batches: float) -> None:
    found: list[TrainingLength] = []

    class Look(Timer):
        def on_train_start(self, trainer: object, module: object) -> None:
            super().on_train_start(trainer, module)  # type: ignore[arg-type]
            found.append(training_length(trainer))
            raise KeyboardInterrupt

    trainer = quiet_trainer(callbacks=[Look(timedelta(hours=1))], limit_val_batches=0, **arguments)
    with pytest.raises(SystemExit):
        trainer.fit(tiny.module(num_layers=1), tiny.data())
    (length,) = found
    assert length.num_batches == batches
    assert 3000 < length.seconds <= 3600
