"""What the ranks of tests on changing loss weights run."""

from __future__ import annotations

from typing import Any

import tiny
import torch

SCHEDULE = {1: {"energy": 50.0, "forces": 0.5}, 2: {"stress": 30.0}}


def trained(strategy: dict[str, Any] | None, schedule: dict[int, dict[str, float]] | None) -> dict[str, torch.Tensor]:
    """Returns the parameters after three epochs in which the weights of the loss change."""
    from lightning_januspipe.callbacks import LossWeightSchedule
    from lightning_januspipe.testing import quiet_trainer

    callbacks = [LossWeightSchedule(schedule)] if schedule else []
    trainer = quiet_trainer(strategy, max_epochs=3, callbacks=callbacks, limit_val_batches=0)
    module = tiny.module(num_layers=2, stress_weight=0.0, learning_rate=1e-3)
    trainer.fit(module, tiny.data(num_train=4, batch_size=2))
    return {name: value.detach().clone() for name, value in module.named_parameters()}
