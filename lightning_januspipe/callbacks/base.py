"""The base classes of Lightning that callbacks here derive from: of ``lightning`` where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_januspipe.runtime.runner import Runner

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
    except ModuleNotFoundError:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.callbacks import ModelSummary, RichProgressBar

__all__ = ["Callback", "LightningModule", "ModelSummary", "RichProgressBar", "Trainer", "runner_of"]


def runner_of(trainer: Trainer) -> Runner | None:
    """This rank's part of the module under JanusPipe, once it is known; None before that and with other strategies."""
    return getattr(trainer.strategy, "runner", None)
