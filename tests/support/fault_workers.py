"""What the ranks of the tests of faults run: unequal data, gradients that are not finite, many Trainers."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import tiny
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_januspipe.testing import quiet_trainer


class Stream(IterableDataset[Any]):
    """Samples one after the other; it may say that there are more than there are."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class WrongStream(Stream):
    def __len__(self) -> int:
        return 100


def unequal(kind: str, strategy: dict[str, Any], sizes: dict[int, int], **arguments: Any) -> tuple[str, int, float]:
    """Trains with as many batches on each replica as ``sizes`` says; returns the error, the steps and the seconds."""
    module, source = tiny.module(), tiny.data()
    trainer = quiet_trainer({"timeout": 60, "num_microbatches": 1, **strategy}, max_epochs=2, **arguments)
    source.setup("fit")
    given = source.train_dataloader()
    replica = int(os.environ["RANK"]) % strategy.get("data_size", 1)
    indices = [i % len(given.dataset) for i in range(sizes[replica])]
    dataset: Any = Subset(given.dataset, indices)
    if kind != "map":
        dataset = {"iterable": Stream, "wrong length": WrongStream}[kind]([given.dataset[i] for i in indices])
    began = time.monotonic()
    try:
        trainer.fit(module, DataLoader(dataset, batch_size=1, collate_fn=given.collate_fn))
    except Exception as error:
        return f"{type(error).__name__}: {error}", trainer.global_step, time.monotonic() - began
    return "", trainer.global_step, time.monotonic() - began


def bad_gradient(strategy: dict[str, Any], rank: int, step: int) -> tuple[str, int]:
    """Trains with a gradient that is infinite on one rank in one step, where the loss is finite."""
    module = tiny.module()

    class Module(type(module)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            is_here = self.global_rank == rank and self.trainer.global_step == step
            return loss + (loss - loss.detach()).sqrt() if is_here else loss

    module.__class__ = Module
    trainer = quiet_trainer({"timeout": 60, **strategy}, max_steps=4, limit_val_batches=0)
    try:
        trainer.fit(module, tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}", trainer.global_step
    return "", trainer.global_step


def fits(strategy: dict[str, Any], num: int) -> list[tuple[int, int]]:
    """Returns how many descriptors and threads this process has after each of several Trainers."""
    module, data, found = tiny.module(), tiny.data(), []
    for _ in range(num):
        trainer = quiet_trainer({"timeout": 60, **strategy}, max_steps=1, limit_val_batches=0)
        trainer.fit(module, data)
        gc.collect()
        torch.distributed.barrier()
        found.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert threading.active_count() < 10
    return found
