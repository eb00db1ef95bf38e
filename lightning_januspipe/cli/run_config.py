"""Saves the configuration of a run beside its checkpoints, and never over another file."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import SaveConfigCallback
else:
    try:
        from lightning.pytorch.cli import SaveConfigCallback
    except ModuleNotFoundError:
        from pytorch_lightning.cli import SaveConfigCallback


_OF_EVERY_RUN = re.compile(r"config(-\d+)?\.yaml|hparams\.yaml|events\.out\.tfevents\..*")
"""The files that exist before a run has done anything."""


class RunConfig(SaveConfigCallback):
    """Saves the configuration of a run as ``config.yaml`` in the run's own folder.

    That is the folder of the logger, where the logger has one for each run. Otherwise (other loggers, or none) it is
    the folder of the checkpoints: Lightning would save into the current folder then, over what is there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves the configuration, on the first process."""
        folder = run_folder(trainer)
        os.makedirs(folder, exist_ok=True)
        path = free_path(folder, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, multifile=self.multifile)


def run_folder(trainer: Any) -> str:
    """Returns the folder of a run: its logger's, else that of its checkpoints.

    Args:
        trainer: The Trainer, whose loggers and callbacks are known.
    """
    loggers = trainer.loggers
    own = getattr(loggers[0], "log_dir", None) if loggers else None
    if own:
        return str(own)
    given = next((c.dirpath for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)), None)
    if given:
        return str(given)
    if not loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    # Where ModelCheckpoint saves by default.
    version = loggers[0].version
    name = version if isinstance(version, str) else f"version_{version}"
    folder = os.path.join(loggers[0].save_dir or trainer.default_root_dir, str(loggers[0].name), name)
    return os.path.join(folder, "checkpoints")


def remove_unused(folder: Path, root: Path, began: float) -> None:
    """Removes the folder of a run if the run has written nothing into it but what every run begins with.

    Args:
        folder: The folder, which may be missing; one that is not inside of ``root`` stays.
        root: The folder of all runs. One between the two is removed as well where nothing else is in it.
        began: When the run began, in seconds since the epoch; a folder with older files stays.
    """
    if not folder.is_dir() or root.resolve() not in folder.resolve().parents:
        return
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    if not all(_OF_EVERY_RUN.fullmatch(p.name) and p.stat().st_mtime >= began for p in files):
        return
    shutil.rmtree(folder)
    if folder.parent.resolve() != root.resolve() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def free_path(folder: str, name: str) -> str:
    """Returns the path of a file that is not there yet: ``config.yaml``, else ``config-2.yaml``, and so on.

    Args:
        folder: The folder.
        name: The name that the file has if it is free.
    """
    path, number = os.path.join(folder, name), 1
    stem, suffix = os.path.splitext(path)
    while os.path.exists(path):
        number += 1
        path = f"{stem}-{number}{suffix}"
    return path
