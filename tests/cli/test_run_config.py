"""The configuration of a run is saved in the run's own folder, over no other file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from lightning_januspipe.cli.run_config import free_path, run_folder


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
