"""Resumes in the middle of an epoch: random states, and the pass over the training loader.

A checkpoint of plain Lightning counts the batches of an epoch, but training resumes with the first of them. Here the
loader is brought to the batch after the last one that was trained on, with the random numbers that it had then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_januspipe.loader.copies import AnyLoader, copied_loader
from lightning_januspipe.random_state import random_state, set_random_state

KEY = "januspipe"
"""The entry of a checkpoint that holds :meth:`LoaderProgress.state` of each replica."""


class LoaderProgress:
    """Knows one rank's random states in the present pass over the training data, and brings a loader back to them.

    Args:
        device: This rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._resumed: Mapping[str, Any] | None = None  # state of the checkpoint, until the loader is there
        self._num_done = 0  # batches of the interrupted pass that training has had
        self._at_start: dict[str, Any] | None = None  # random states when the present pass began
        self._at_first: dict[str, Any] | None = None  # random states when its first batch was asked for
        self._after_next: dict[str, Any] | None = None  # random states after its next batch was read ahead
        self._is_training = False
        self._epoch: int | None = None  # index of the epoch that the last batch was of

    def state(self) -> dict[str, Any]:
        """Returns the entry of a checkpoint from which training resumes here."""
        states = {"now": random_state(self._device), "began": self._at_start, "first": self._at_first}
        return {**states, "epoch": self._epoch}

    def resume(self, checkpoint: Mapping[str, Any], replica: int) -> None:
        """Resumes from a checkpoint as soon as there is a loader.

        Args:
            checkpoint: A whole checkpoint. Without the entry :data:`KEY` batches are passed over, but random states
                stay as they are.
            replica: Index of this rank's replica. If the checkpoint has the states of fewer replicas, several resume
                with the same states.
        """
        saved = checkpoint.get(KEY, {}).get("replicas", [])
        self._resumed = saved[replica % len(saved)] if saved else {}
        self._epoch = self._resumed.get("epoch")
        self._num_done = batches_done(checkpoint)

    def tracked(self, loader: Any) -> Any:
        """Returns a copy of a loader that reports its passes here; the loader itself if it keeps a state of its own."""
        if not isinstance(loader, DataLoader) or callable(getattr(loader, "state_dict", None)):
            return loader
        kind = type(loader)
        if issubclass(kind, _Tracked):
            kind = kind.__mro__[2]
        tracked = copied_loader(_Tracked, kind, loader)
        tracked.januspipe_progress = self
        return tracked

    def start_pass(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns a pass over the loader: a new one, or the rest of the interrupted one."""
        if self._resumed is not None:
            return self._rest_of_pass(make)
        self._at_start, self._at_first = random_state(self._device), None
        return self._whole_pass(make())

    def _whole_pass(self, batches: Iterator[Any]) -> Iterator[Any]:
        self._at_first = random_state(self._device)  # samplers draw their seeds when the first batch is asked for
        yield from batches

    def _rest_of_pass(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        batches = self._rejoined(make)  # with the first batch that is asked for: the sampler's epoch is known then
        for batch in islice(batches, 1):
            if not self._is_training and self._resumed:  # the batch was read ahead, setting up goes on
                self._after_next = random_state(self._device)
            yield batch
        yield from batches

    def _rejoined(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Returns a new pass after as many batches as training has had of the interrupted one."""
        assert self._resumed is not None
        if self._num_done == 0:
            if not self._is_training:
                self._set(self._resumed.get("now"))
            self._at_start = random_state(self._device)
            batches = make()
            self._at_first = random_state(self._device)
            return batches
        self._at_start, self._at_first = self._resumed.get("began"), self._resumed.get("first")
        self._set(self._at_start)
        batches = make()
        self._set(self._at_first)
        for _ in range(self._num_done):
            next(batches, None)
        self._set(self._resumed.get("now"))
        return batches

    def training_starts(self) -> None:
        """Undoes the random numbers that setting up has drawn since the checkpoint was loaded."""
        self._is_training = True
        self._set(self._after_next or (self._resumed or {}).get("now"))

    def batch_is_taken(self, epoch: int) -> None:
        """Makes the next pass a new one: the interrupted one goes on, in the epoch with this index."""
        self._epoch = epoch
        self._resumed = self._after_next = None

    def _set(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            set_random_state(state, self._device)


def batches_done(checkpoint: Mapping[str, Any]) -> int:
    """Returns how many batches of its epoch a checkpoint has been trained on; 0 at the end of an epoch."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if not progress:
        return 0
    done = int(progress["current"]["completed"]) + (not _is_counted(progress))
    return 0 if progress.get("is_last_batch") and done >= progress["current"]["ready"] else done


def _is_counted(batches: Mapping[str, Any]) -> bool:
    """Returns whether the last batch is counted; otherwise a hook at its end has saved the checkpoint."""
    return bool(batches["total"]["completed"] == batches["total"]["processed"])


def reopen_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Corrects the numbers of epochs with which Lightning's training loop resumes.

    - Lightning counts an epoch whenever it leaves it, also because of ``max_steps`` or a callback. From a checkpoint
      that was saved after it was counted, Lightning would begin the next epoch, while the loader goes on with the rest
      of this one: it is made the present epoch again.
    - After a whole epoch, if ``max_steps`` is given, Lightning would leave the next one after its first batch, since it
      goes on to count the batches of the one before: the next one is made to begin.
    - A run that was resumed at the end of an epoch does not count that another one has begun, and if nobody knows the
      number of batches, it goes on to count these too.

    Args:
        checkpoint: A whole checkpoint; the numbers of its training loop are changed.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_progress")
    if not progress:
        return
    current, batches = progress["current"], loop["epoch_loop.batch_progress"]
    is_whole = not batches_done(checkpoint)
    if is_whole and not batches.get("is_last_batch"):
        return  # no batch was trained on
    saved = checkpoint.get(KEY, {}).get("replicas") or [{}]
    epoch = saved[0].get("epoch")
    if epoch is None:
        epoch = _epoch_of_plain_lightning(current, batches, is_whole)
    is_counted = _is_counted(batches)
    has_ended = is_whole and (current["processed"] > epoch or not is_counted)
    ended = epoch + has_ended
    for stage, number in {"ready": epoch + 1, "started": epoch + 1, "processed": ended, "completed": ended}.items():
        progress["total"][stage] += number - current[stage]
        current[stage] = number
    if has_ended:
        batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
    if has_ended and not is_counted:
        batches["total"]["completed"] += 1
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def _epoch_of_plain_lightning(current: Mapping[str, Any], batches: Mapping[str, Any], is_whole: bool) -> int:
    """Returns the index of the epoch of the last batch, which a file of plain Lightning does not tell.

    It is assumed to be the last one that was begun, unless that would be the first one after batches of another.
    """
    ready, processed = int(current["ready"]), int(current["processed"])
    if is_whole:
        is_later = processed > current["completed"] or (_is_counted(batches) and processed >= ready)
        return processed - int(is_later)
    is_later = batches["total"]["ready"] > batches["current"]["ready"]
    return max(ready - 1, min(processed, int(is_later)))


class _Tracked(AnyLoader):
    """Adds reports of its passes to the class of a loader; see :func:`copied_loader`."""

    januspipe_progress: LoaderProgress

    def __iter__(self) -> Any:
        return self.januspipe_progress.start_pass(super().__iter__)
