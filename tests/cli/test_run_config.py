"""The configuration of a run is saved in the run's own folder, over no other file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from lightning_januspipe.cli.run_config import free_path, remove_unused, run_folder


def trainer_of(root: Path, logger: Any = None, **checkpoint: Any) -> Any:
    callbacks = [SimpleNamespace(**checkpoint)] if checkpoint else []
    return SimpleNamespace(
        loggers=[logger] if logger else [], checkpoint_callbacks=callbacks, default_root_dir=str(root)
    )


def test_folders(tmp_path: Path) -> None:
    """A logger without a folder of its own, such as that of W&B, has the current one as save_dir."""
    logger = CSVLogger(str(tmp_path))
    assert run_folder(trainer_of(tmp_path, logger)) == logger.log_dir
    wandb = SimpleNamespace(save_dir=".", name="alloys", version="x7")
    assert run_folder(trainer_of(tmp_path, wandb)) == "./alloys/x7/checkpoints"
    assert run_folder(trainer_of(tmp_path, wandb, dirpath="saved")) == "saved"
    assert run_folder(trainer_of(tmp_path)) == str(tmp_path / "checkpoints")


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    for name in ("config.yaml", "config-2.yaml", "config-3.yaml"):
        path = Path(free_path(str(tmp_path), "config.yaml"))
        assert path == tmp_path / name
        path.touch()


def test_folder_of_a_run_that_did_nothing_is_removed(tmp_path: Path) -> None:
    """Unless it holds results, or files of another run."""
    logs = tmp_path / "lightning_logs"

    def folder_with(*names: str) -> Path:
        folder = logs / "version_0"
        for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.1.host", *names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    remove_unused(logs / "version_9", tmp_path, 0.0)
    remove_unused(folder_with("checkpoints/best.ckpt"), tmp_path, 0.0)
    assert (logs / "version_0" / "config.yaml").exists()
    (logs / "version_0" / "checkpoints" / "best.ckpt").unlink()
    folder = folder_with()
    os.utime(folder / "hparams.yaml", (1.0, 1.0))
    remove_unused(folder, tmp_path, 2.0)
    assert folder.exists()
    remove_unused(folder, tmp_path, 0.0)
    assert tmp_path.exists() and not logs.exists()
    beside = folder_with().parent / "version_1"
    beside.mkdir()
    remove_unused(folder, tmp_path, 0.0)
    assert list(logs.iterdir()) == [beside]
    for root in (beside, logs / "elsewhere"):
        remove_unused(beside, root, 0.0)
        assert beside.exists()
