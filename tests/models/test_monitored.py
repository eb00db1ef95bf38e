"""Checkpoints and early stopping by every error that a fit prints, and by names that it never logs."""

from __future__ import annotations

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_januspipe.models.monitored import check_monitors
from lightning_januspipe.testing import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [f"val_{quantity}_{error}" for quantity in ("energy", "forces", "stress") for error in ("mae", "rmse")]


@pytest.fixture(autouse=True)
def float32_again():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def test_every_error_can_be_monitored(tmp_path):
    names = ["val_loss", *NAMES]
    saving = [
        ModelCheckpoint(tmp_path / name, monitor=name, filename=f"{{epoch}}-{{{name}:.6f}}", save_top_k=1)
        for name in names
    ]
    stopping = [EarlyStopping(name, patience=5, strict=True) for name in [*names, "train_forces_mae", "train_loss"]]
    trainer = quiet_trainer(max_epochs=2, callbacks=[*saving, *stopping], enable_checkpointing=True)
    module = tiny.module(num_layers=1)
    trainer.fit(module, tiny.data(4, 4))
    assert set(module.logged_names()) <= set(trainer.callback_metrics)
    assert all(torch.isfinite(one.best_model_score) and one.best_model_path for one in saving)
    assert all(torch.isfinite(one.best_score) for one in stopping)


@pytest.mark.parametrize(
    ("callbacks", "arguments", "message"),
    [
        (
            [EarlyStopping("val_force_mae")],
            {},
            "EarlyStopping monitors 'val_force_mae', .* did you mean 'val_forces_mae'",
        ),
        (
            [ModelCheckpoint(monitor="val_f1")],
            {},
            "ModelCheckpoint monitors 'val_f1', which is never logged; expected one",
        ),
        ([], {"lr_scheduler": "plateau", "monitor": "val_los"}, "lr_scheduler monitors 'val_los', .* mean 'val_loss'"),
    ],
)
def test_other_names_are_refused_before_training(callbacks, arguments, message):
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(ValueError, match=message):
        trainer.fit(tiny.module(num_layers=1, **arguments), tiny.data(4, 4))


def test_values_of_other_callbacks_are_left_alone():
    check_monitors([EarlyStopping("januspipe/step_ms"), object()], ["val_loss"], [("lr_scheduler", "val_loss")])
