"""Finds the classes of Lightning that the callbacks derive from: those of ``lightning`` if it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_januspipe.runtime.runner import Runner
from lightning_januspipe.schedule.figures import SUFFIXES

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

__all__ = [
    "Callback",
    "LightningModule",
    "ModelSummary",
    "RichProgressBar",
    "Trainer",
    "check_suffix",
    "output_folder",
    "runner_of",
]


def runner_of(trainer: Trainer) -> Runner | None:
    """Returns the runner of this rank; None before it is known, and with other strategies than JanusPipe."""
    return getattr(trainer.strategy, "runner", None)


def check_suffix(suffix: str) -> None:
    """Raises an error for a format that pictures cannot be drawn in.

    Raises:
        ValueError: ``suffix`` is neither ``svg`` nor ``png``.
    """
    if f".{suffix}" not in SUFFIXES:
        raise ValueError(f"suffix={suffix!r}; expected one of {', '.join(e[1:] for e in SUFFIXES)}")


def output_folder(trainer: Trainer, dirpath: str | None) -> Path:
    """Returns the folder for a callback's files, by default the logger's or the Trainer's; all ranks have to call it.

    Args:
        trainer: The Trainer that runs the callback.
        dirpath: The folder that the user gave.
    """
    return Path(dirpath or trainer.log_dir or trainer.default_root_dir)
