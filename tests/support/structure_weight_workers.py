"""What the ranks of tests on weights of structures run."""

from __future__ import annotations

from typing import Any

import tiny
import torch

WEIGHTS = {"third": 5.0, "Default": 0.5}


def trained(strategy: dict[str, Any] | None, file: str, weights: dict[str, float] | None) -> dict[str, torch.Tensor]:
    """Returns the parameters and the logged validation loss after two epochs."""
    from lightning_januspipe.data import ASEDataModule
    from lightning_januspipe.testing import quiet_trainer

    data = ASEDataModule(
        file,
        val_file=file,
        species=["Cu", "Ni", "Al"],
        dtype="float64",
        batch_size=2,
        shuffle=False,
        require_labels=False,
        config_type_weights=weights,
        weight_key=None if weights is None else "config_weight",
    )
    trainer = quiet_trainer(strategy, max_epochs=2)
    module = tiny.module(num_layers=2, learning_rate=1e-3)
    trainer.fit(module, data)
    loss = trainer.callback_metrics["val_loss"].detach().clone()
    return {"val_loss": loss} | {name: value.detach().clone() for name, value in module.named_parameters()}
