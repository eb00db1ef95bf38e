"""Attributes that change in training are told, as the captured graph holds them as constants."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning
import pytest
import tiny
from compiled_workers import interpreted

from lightning_januspipe.testing import quiet_trainer


class _Changing(lightning.Callback):
    """Changes an attribute before each step, and others that no graph depends on."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        potential = module.potential
        potential.energy_model.layers[0].factor = 1.0 + trainer.global_step
        potential.not_a_number = math.nan
        potential._calls = trainer.global_step
        potential.eval()
        potential.train()


def test_changed_attributes_are_told_once() -> None:
    module = tiny.module(num_layers=1)
    module.potential.energy_model.layers[0].factor = 1.0
    trainer = quiet_trainer({"compile": True, "num_microbatches": 1}, max_steps=3, callbacks=[_Changing()])
    with interpreted(), pytest.warns(UserWarning, match="attributes of the potential") as found:
        trainer.fit(module, tiny.data().train_dataloader())
    (text,) = [str(w.message) for w in found if "attributes of the potential" in str(w.message)]
    assert ": energy_model.layers.0.factor from 1.0 to 2.0. This has no effect" in text


def test_training_changes_none_by_itself() -> None:
    trainer = quiet_trainer({"compile": True, "num_microbatches": 1}, max_steps=2, limit_val_batches=1)
    with interpreted(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="attributes of the potential")
        trainer.fit(tiny.module(num_layers=1), tiny.data())
