"""Ends that come from outside or from one rank: all ranks stop after the same batch, or none waits for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_januspipe.mesh import Mesh

GRACE = timedelta(seconds=10)
"""How long a rank that ends with an exception waits for the others to end at the same place."""


class CoordinatedShutdown:
    """Signals and exceptions of one run on several ranks.

    Args:
        trainer: the Trainer.
        mesh: this rank's process groups.
        run: number of the run in this process, the same on all ranks.
    """

    def __init__(self, trainer: Any, mesh: Mesh, run: int) -> None:
        self._trainer, self._mesh, self._run = trainer, mesh, run
        self._is_requested = self._must_stop = False
        self._flag: torch.Tensor | None = None
        self._pending: Any = None
        self._are_together: bool | None = None
        self._callbacks: list[Any] = []
        # Lightning's own handler sends messages from within the signal handler, in the middle of whatever is going on.
        trainer._signal_connector._sigterm_notifier_fn = self._on_sigterm
        for callback in trainer.checkpoint_callbacks:
            callback.__dict__["on_exception"] = self._guarded(callback, callback.on_exception)
            self._callbacks.append(callback)

    def release(self) -> None:
        """Leave nothing on the Trainer and its callbacks."""
        self._trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
        for callback in self._callbacks:
            callback.__dict__.pop("on_exception", None)
        self._callbacks = []

    # -- signals -----------------------------------------------------------------------------------------------------

    def _on_sigterm(self, signum: Any, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if not self._is_requested and launcher is not None:
            launcher.kill(signum)  # the processes that it has started get the signal too
        self._is_requested = True

    def ask(self) -> None:
        """Tell the other ranks, at the start of a batch, whether this one was asked to stop; nobody waits."""
        self.hear()
        self._flag = torch.tensor(int(self._is_requested))
        self._pending = dist.all_reduce(self._flag, group=self._mesh.host_group, async_op=True)

    def hear(self) -> None:
        """Stop after this batch if any rank was asked to: the Trainer then raises ``SIGTERMException``."""
        if self._pending is None:
            return
        assert self._flag is not None
        self._pending.wait()
        self._pending = None
        self._must_stop = self._must_stop or bool(self._flag)
        # At the end of an epoch the Trainer would stop where its counters are between two epochs, and be off by one
        # when it resumes: it stops after the first batch of the next.
        if self._must_stop and not self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._trainer._signal_connector.received_sigterm = True

    # -- exceptions --------------------------------------------------------------------------------------------------

    def are_together(self) -> bool:
        """Whether all ranks have ended after the same batch, so that they can save a checkpoint together.

        Waits for the others, for :data:`GRACE` at most; a rank that is alone with its exception will not be joined.
        """
        if self._are_together is None:
            self._are_together = not self._mesh.aborted and self._meet()
            if not self._are_together:
                self._mesh.abort()
        return self._are_together

    def give_up(self) -> None:
        """Close this rank's connections, so that no other waits for it, unless all have ended together."""
        self._pending = None
        if not self._are_together:
            self._mesh.abort()

    def _meet(self) -> bool:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.total
        place = f"{self._run}/{progress.ready}-{progress.processed}-{progress.completed}"
        try:
            store = dist.distributed_c10d._get_default_store()
            if store.add(f"januspipe/end/{place}/count", 1) < self._mesh.shape.size:
                with suppress(dist.DistStoreError):  # timed out
                    store.wait([f"januspipe/end/{place}/all"], min(GRACE, self._mesh.timeout or GRACE))
                    return self._agree(store, place, "yes")
                return self._agree(store, place, "no")
            return self._agree(store, place, "yes")
        except RuntimeError:  # the store has ended with its rank
            return False

    def _agree(self, store: Any, place: str, answer: str) -> bool:
        """Whether all are there; the first answer is everyone's."""
        return bool(store.compare_set(f"januspipe/end/{place}/all", "", answer) == b"yes")

    def _guarded(self, callback: Any, on_exception: Callable[..., None]) -> Callable[..., None]:
        def guarded(trainer: Any, module: Any, exception: BaseException) -> None:
            if getattr(callback, "save_on_exception", True) and not self.are_together():
                warnings.warn(
                    f"{type(callback).__name__} saves no checkpoint on {type(exception).__name__}: not all ranks have "
                    "ended at the same place, so their parts cannot be gathered. Resume from the last checkpoint that "
                    "was saved in training.",
                    stacklevel=2,
                )
                return
            on_exception(trainer, module, exception)

        return guarded
