"""A script of a user with two ranks, which the Trainer's own launcher starts: trains well, or ends as it is told to."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from launching_workers import module_of
from logging_workers import loader

import lightning_januspipe


def listening(port: int) -> list[str]:
    """Returns the addresses at which something listens on a port, as the kernel writes them."""
    lines = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]


class Ends(lightning.Callback):
    """Writes down how a rank was started, and fails in the second step of one rank."""

    def __init__(self, how: str, rank: int, folder: Path) -> None:
        self.how, self.rank, self.folder = how, rank, folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.barrier()
        found = {
            "threads": torch.get_num_threads(),
            "variable": os.environ["OMP_NUM_THREADS"],
            "listening": listening(int(os.environ["MASTER_PORT"])),
            "pid": os.getpid(),
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1 or self.rank not in (-1, trainer.global_rank):
            return
        if self.how == "raise":
            raise KeyError(f"no such thing on rank {trainer.global_rank}" if self.rank >= 0 else "nowhere")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os._exit(3)


def main() -> None:
    how, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_default_dtype(torch.float64)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=lightning_januspipe.JanusPipeStrategy(num_microbatches=2),
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Ends(how, rank, folder)],
    )
    trainer.fit(module_of("lightning"), loader(16, 4))


if __name__ == "__main__":
    main()
