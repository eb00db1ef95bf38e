"""What the ranks of the tests of waits run: training in which one rank stops for good."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
from checkpoint_workers import data
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.checkpoint.sharded import PartWriter
from lightning_januspipe.distributed import set_timeout
from lightning_januspipe.testing import quiet_trainer

HOOKS = {
    "on_train_batch_start": "before a batch",
    "on_before_backward": "before the reduction",
    "on_before_optimizer_step": "before clipping",
    "on_train_batch_end": "after a batch",
    "on_train_epoch_end": "at the end of the epoch",
    "on_validation_batch_start": "in validation",
    "on_validation_end": "after validation",
    "on_save_checkpoint": "before saving",
}
PLACES = (*HOOKS.values(), "in the step", "while writing")


class Stopping(Callback):
    """Stops one rank at a place, once all waits have a short timeout."""

    def __init__(self, rank: int, place: str, folder: str, timeout: float) -> None:
        self.rank, self.place, self.folder, self.timeout = rank, place, Path(folder), timeout
        self.trainer: Any = None

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.trainer = trainer
        (self.folder / f"{trainer.global_rank}.pid").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self._shorten(trainer.strategy)
        self.reach("before a batch")

    def reach(self, place: str) -> None:
        """Stops this process, if this is the rank and the place."""
        trainer = self.trainer
        if place == self.place and trainer.global_rank == self.rank and trainer.global_step >= 2:
            (self.folder / "mark").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)

    def _shorten(self, strategy: Any) -> None:
        mesh, timeout = strategy.mesh, timedelta(seconds=self.timeout)
        groups = [value for name, value in vars(mesh).items() if name.endswith("_group") and value is not None]
        set_timeout(timeout, [None, *groups])
        mesh.timeout = timeout
        if hasattr(strategy.runner, "executor"):
            strategy.runner.executor._timeout = timeout


for _hook, _place in HOOKS.items():
    if _hook != "on_train_batch_start":
        setattr(Stopping, _hook, lambda self, *_, place=_place: self.reach(place))


def train(strategy: dict[str, Any], rank: int, place: str, folder: str, timeout: float) -> None:
    """Trains until a rank stops; the others write to files how and when they have ended, and end the stopped one."""
    stopping = Stopping(rank, place, folder, timeout)
    module = tiny.module()
    save, write_data = atomic.write, PartWriter.write_data

    class Module(type(module)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            stopping.reach("in the step")
            return super().training_step(batch, batch_idx)

    def writing(*arguments: Any, **more: Any) -> None:
        stopping.reach("while writing")
        save(*arguments, **more)

    def writing_shards(*arguments: Any) -> Any:
        stopping.reach("while writing")
        return write_data(*arguments)

    module.__class__ = Module
    saves = "saving" in place or "writing" in place
    checkpoints = ModelCheckpoint(folder + "/checkpoints", save_top_k=-1, every_n_train_steps=1, save_on_exception=True)
    given = {"num_microbatches": 2, "timeout": 60, **strategy}
    trainer = quiet_trainer(
        given,
        max_epochs=50,
        gradient_clip_val=10.0,
        callbacks=[stopping, *([checkpoints] if saves else [])],
        enable_checkpointing=saves,
        limit_val_batches=2 if "validation" in place else 0,
    )
    ended = ""
    try:
        with patch.object(atomic, "write", writing), patch.object(PartWriter, "write_data", writing_shards):
            trainer.fit(module, data(strategy.get("data_size", 1)))
    except BaseException as error:
        if not (Path(folder) / "mark").exists():
            raise
        ended = f"{type(error).__name__}: {error}"
    mine, size = trainer.global_rank, trainer.strategy.mesh_shape.size
    seconds = time.time() - float((Path(folder) / "mark").read_text())
    (Path(folder) / f"{mine}.new").write_text(json.dumps({"ended": ended, "seconds": seconds}))
    (Path(folder) / f"{mine}.new").rename(Path(folder) / f"{mine}.json")
    if len(list(Path(folder).glob("*.json"))) == size - 1:
        os.kill(int((Path(folder) / f"{rank}.pid").read_text()), signal.SIGKILL)
