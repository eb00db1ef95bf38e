"""What is said when a run is stopped."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_januspipe.strategy.ending import describe_interruption, newest_checkpoint


def trainer_of(*callbacks: Any) -> Any:
    return SimpleNamespace(checkpoint_callbacks=callbacks, global_step=12, current_epoch=2)


def saved(path: Path, at: float) -> str:
    path.touch()
    os.utime(path, (at, at))
    return str(path)


def test_the_newest_checkpoint_of_the_run(tmp_path: Path) -> None:
    """Those of earlier runs do not count; what OnExceptionCheckpoint saves is of the present step."""
    best, at_end = ModelCheckpoint(), OnExceptionCheckpoint(str(tmp_path))
    trainer = trainer_of(best, at_end)
    assert newest_checkpoint(trainer, 0.0) == ("", None)
    best.best_model_path, best._last_global_step_saved = saved(tmp_path / "best.ckpt", 100.0), 8
    assert newest_checkpoint(trainer, 50.0) == (best.best_model_path, 8)
    assert newest_checkpoint(trainer, 150.0) == ("", None)
    saved(Path(at_end.ckpt_path), 90.0)
    assert newest_checkpoint(trainer, 50.0) == (best.best_model_path, 8)
    saved(Path(at_end.ckpt_path), 110.0)
    assert newest_checkpoint(trainer, 50.0) == (at_end.ckpt_path, 12)


def test_sentences() -> None:
    told = describe_interruption(trainer_of(), SIGTERMException(), "a.ckpt", 12)
    assert told.startswith("Stopped by SIGTERM after step 12, in epoch 2. The newest checkpoint is a.ckpt, of step 12;")
    assert "ckpt_path='a.ckpt' goes on from it" in told
    told = describe_interruption(trainer_of(), KeyboardInterrupt(), "", None)
    assert told.startswith("Stopped by Ctrl-C after step 12, in epoch 2. No checkpoint was saved.")
