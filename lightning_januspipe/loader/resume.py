"""Where training stands beside parameters and loops: random states, and the pass over the training loader.

A checkpoint of plain Lightning counts the batches of an epoch, but training goes on with the first of them. Here the
loader is brought to the batch after the last one that was trained on, with the random numbers that it had then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_januspipe.loader.copies import AnyLoader, copied_loader
from lightning_januspipe.random_state import random_state, set_random_state

KEY = "januspipe"
"""The entry of a checkpoint that holds what :meth:`LoaderProgress.state` gives for each replica."""


class LoaderProgress:
    """Random states of one rank at the start of the present pass over the training data, and how to get back there.

    Args:
        device: this rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: dict[str, Any] | None = None
        self._first: dict[str, Any] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._num_done = 0
        self._after: dict[str, Any] | None = None
        self._is_settled = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from here."""
        return {"now": random_state(self._device), "began": self._began, "first": self._first}

    def resume(self, checkpoint: Mapping[str, Any], replica: int) -> None:
        """Go on from a checkpoint as soon as there is a loader.

        Args:
            checkpoint: a whole checkpoint; without the entry of :data:`KEY` only batches are counted.
            replica: of this rank. If there were fewer when the checkpoint was saved, several go on with one's states.
        """
        saved = checkpoint.get(KEY, {}).get("replicas", [])
        self._resumed = saved[replica % len(saved)] if saved else {}
        self._num_done = batches_done(checkpoint)

    def tracked(self, loader: Any) -> Any:
        """A loader whose passes are known here. A loader that keeps a state of its own is left to Lightning."""
        if not isinstance(loader, DataLoader) or callable(getattr(loader, "state_dict", None)):
            return loader
        kind = type(loader)
        if issubclass(kind, _Tracked):
            kind = kind.__mro__[2]
        tracked = copied_loader(_Tracked, kind, loader)
        tracked.januspipe_progress = self
        return tracked

    def begin(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """A pass over the loader: a new one, or the rest of the one that was interrupted."""
        if self._resumed is None:
            self._began, self._first = random_state(self._device), None
            return _Pass(make(), self)
        return _Rest(make, self)

    def rejoin(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The rest of the interrupted pass, when its next batch is asked for: the sampler's epoch is known then."""
        assert self._resumed is not None
        if self._num_done == 0:
            if not self._is_settled:
                self._set(self._resumed.get("now"))
            self._began = random_state(self._device)
            batches = make()
            self.noted()
            return batches
        self._began, self._first = self._resumed.get("began"), self._resumed.get("first")
        self._set(self._began)
        batches = make()
        self._set(self._first)
        for _ in range(self._num_done):
            next(batches, None)
        self._set(self._resumed.get("now"))
        return batches

    def rejoined(self) -> None:
        """The next batch is there; where it was read ahead, setting up goes on now."""
        if not self._is_settled and self._resumed:
            self._after = random_state(self._device)

    def settle(self) -> None:
        """Forget the random numbers that setting up has drawn: training begins now."""
        self._is_settled = True
        self._set(self._after or (self._resumed or {}).get("now"))

    def moved_on(self) -> None:
        """A batch was taken: the next pass is a new one."""
        self._resumed = self._after = None

    def noted(self) -> None:
        """The first batch of a pass is asked for: samplers draw their seed only now."""
        self._first = random_state(self._device)

    def _set(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            set_random_state(state, self._device)


def batches_done(checkpoint: Mapping[str, Any]) -> int:
    """How many batches of its epoch training had done when a checkpoint was saved; 0 at the end of an epoch."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if not progress:
        return 0
    total, current = progress["total"], progress["current"]
    is_counted = total["completed"] == total["processed"]  # else it was saved by a hook at the end of a batch
    done = int(current["completed"]) + (not is_counted)
    return 0 if progress.get("is_last_batch") and done >= current["ready"] else done


class _Tracked(AnyLoader):
    """Comes before the class of a loader in that of its copy."""

    januspipe_progress: LoaderProgress

    def __iter__(self) -> Any:
        return self.januspipe_progress.begin(super().__iter__)


class _Pass(Iterator[Any]):
    """One pass over a tracked loader from its beginning."""

    def __init__(self, batches: Iterator[Any], progress: LoaderProgress) -> None:
        self._batches, self._progress, self._is_first = batches, progress, True

    def __next__(self) -> Any:
        if self._is_first:
            self._is_first = False
            self._progress.noted()
        return next(self._batches)


class _Rest(Iterator[Any]):
    """What is left of a pass that a checkpoint has interrupted."""

    def __init__(self, make: Callable[[], Iterator[Any]], progress: LoaderProgress) -> None:
        self._make, self._progress = make, progress
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is not None:
            return next(self._batches)
        self._batches = self._progress.rejoin(self._make)
        batch = next(self._batches)
        self._progress.rejoined()
        return batch
