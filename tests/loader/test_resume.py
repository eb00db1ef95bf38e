"""A run that was saved at any point goes on with the next batch, in the epoch that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_januspipe.testing import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_BATCHES = 4  # of an epoch
EVERY = [(epoch, batch) for epoch in range(5) for batch in range(NUM_BATCHES)]


class Noting(lightning.LightningModule):
    """Notes epoch and batch of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[tuple[int, int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append((self.current_epoch, int(batch)))
        return (self.weight - batch).square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(lightning.Callback):
    """Saves in a hook, once so many steps were made."""

    def __init__(self, file: Path, hook: str, step: int) -> None:
        def save(trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and not file.exists():
                trainer.save_checkpoint(file)

        setattr(self, hook, save)


class Stream(IterableDataset[Tensor]):
    """Batches of which nobody knows the number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(NUM_BATCHES))


BATCH, EPOCH, VALIDATION, END = "on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end"
Run = tuple[dict[str, int], str, int]
"""When a run ends, and after which of its steps it is saved in which hook."""

RUNS: dict[str, list[Run]] = {
    "after a number of steps": [({"max_steps": 3}, END, 3), ({"max_steps": 5}, END, 5)],
    "in a hook of such an epoch": [({"max_steps": 3}, EPOCH, 3), ({"max_steps": 6}, EPOCH, 6)],
    "at the end of an epoch": [({"max_steps": 4}, END, 4), ({"max_steps": 8}, END, 8)],
    "in a hook of its end": [({"max_epochs": 3}, EPOCH, 4), ({"max_steps": 14}, EPOCH, 8)],
    "after its last batch": [
        ({"max_epochs": 1}, BATCH, 4),
        ({"max_epochs": 2}, BATCH, 8),
        ({"max_steps": 9}, EPOCH, 9),
    ],
    "after its last batch, and in the next one": [({"max_steps": 10}, BATCH, 4), ({"max_steps": 6}, END, 6)],
    "in the middle": [({"max_epochs": 2}, BATCH, 2), ({"max_steps": 7}, BATCH, 5), ({"max_steps": 7}, END, 7)],
    "after validation": [({"max_steps": 4}, VALIDATION, 4), ({"max_steps": 8}, END, 8)],
}


@pytest.mark.parametrize("data", [torch.arange(NUM_BATCHES), Stream()], ids=["", "stream"])
@pytest.mark.parametrize("first", [None, {}], ids=["plain", ""])
@pytest.mark.parametrize("runs", RUNS)
def test_every_batch_once_and_in_its_epoch(tmp_path: Path, runs: str, first: dict[str, Any] | None, data: Any) -> None:
    arguments = {"limit_val_batches": 1 if runs == "after validation" else 0}
    found, resume, strategy = Noting(), None, first
    for number, (ends, hook, step) in enumerate([*RUNS[runs], ({"max_epochs": 4}, END, 16)]):
        file = tmp_path / f"{number}.ckpt"
        begun, found.validated = len(found.steps), []
        trainer = quiet_trainer(strategy, callbacks=[Save(file, hook, step)], **arguments, **ends)
        loaders = [DataLoader(data, batch_size=1) for _ in range(2)]
        trainer.fit(found, *loaders, ckpt_path=resume)
        last = ends["max_steps"] if "max_steps" in ends else NUM_BATCHES * ends["max_epochs"]
        assert found.steps[begun:] == EVERY[begun:last], f"run {number}"
        ended = range(begun // NUM_BATCHES, last // NUM_BATCHES) if arguments["limit_val_batches"] else []
        assert found.validated == list(ended), f"run {number}"
        found.steps, resume, strategy = found.steps[:step], file, {}
