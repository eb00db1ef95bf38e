"""Ends a run early: on a signal all ranks stop after the same batch, on an error no rank waits for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_januspipe.distributed import PatientStore, waiting
from lightning_januspipe.errors import PipelineError, RankLostError
from lightning_januspipe.mesh import Mesh

GRACE = timedelta(seconds=10)
"""How long a rank that ends with an exception waits for the others to end after the same batch."""


class CoordinatedShutdown:
    """Lets all ranks of a run stop together, on signals and on exceptions.

    Args:
        trainer: The Trainer that has to stop.
        mesh: This rank's process groups.
        run: How many runs this process has started, which is the same on all ranks.

    Attributes:
        is_compiling: Tells whether this rank still compiles its stages in the background.
        all_have_compiled: Whether no rank did when all ranks asked last, which is the same on all ranks between the
            question of a batch and its :meth:`hear`.
    """

    def __init__(self, trainer: Any, mesh: Mesh, run: int) -> None:
        self._trainer, self._mesh, self._run = trainer, mesh, run
        self._is_requested = self._must_stop = False
        self._flag: torch.Tensor | None = None
        self._pending: Any = None
        self._are_together: bool | None = None
        self._callbacks: list[Any] = []
        self.is_compiling: Callable[[], bool] = lambda: True
        self.all_have_compiled = False
        # Lightning's own handler sends messages from within the signal handler, in the middle of whatever is going on.
        trainer._signal_connector._sigterm_notifier_fn = self._on_sigterm
        # Nor does Lightning's own question before each batch tell who did not answer: it hides all errors.
        loop = trainer.fit_loop.epoch_loop
        loop.__dict__["_broadcast_sigterm_tensor"] = lambda: None
        loop.__dict__["advance"] = self._telling_of_its_end(loop.advance)
        for callback in trainer.checkpoint_callbacks:
            callback.__dict__["on_exception"] = self._guarded(callback, callback.on_exception)
            self._callbacks.append(callback)

    def release(self) -> None:
        """Removes its handlers from the Trainer and its callbacks."""
        self._trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
        for name in ("_broadcast_sigterm_tensor", "advance"):
            self._trainer.fit_loop.epoch_loop.__dict__.pop(name, None)
        for callback in self._callbacks:
            callback.__dict__.pop("on_exception", None)
        self._callbacks = []

    # -- signals -----------------------------------------------------------------------------------------------------

    def _on_sigterm(self, signum: Any, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if not self._is_requested and launcher is not None:
            launcher.kill(signum)  # passes the signal on to the processes that it has started
        self._is_requested = True

    def ask(self, has_no_more: bool = False) -> None:
        """Tells the other ranks, without waiting for them, whether this one was asked to stop; called once a batch.

        Args:
            has_no_more: Whether the loader of this rank had no batch, although it had not said that its last one was
                the last.
        """
        self.hear()
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        # Of what has to be the same on all ranks, the largest and the smallest value.
        same = (2 if has_no_more else int(progress.is_last_batch), progress.total.ready, self._trainer.current_epoch)
        flags = int(self._is_requested), int(self.is_compiling())
        self._flag = torch.tensor([*flags, *same, *(-value for value in same)])
        with waiting("the question whether a rank was told to stop", self._mesh.host_group):
            self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._mesh.host_group, async_op=True)

    def hear(self) -> None:
        """Stops after this batch if any rank was asked to: the Trainer then raises ``SIGTERMException``."""
        if self._pending is None:
            return
        assert self._flag is not None
        with waiting("the question whether a rank was told to stop", self._mesh.host_group):
            self._pending.wait()
        self._pending = None
        is_requested, is_compiling, *same = self._flag.tolist()
        self.all_have_compiled = not is_compiling
        if same[:3] != [-value for value in same[3:]]:
            self._refuse_unequal_data()
        self._must_stop = self._must_stop or bool(is_requested)
        # After the last batch of an epoch the Trainer's counters stand between two epochs, and would be off by one on
        # resuming: it stops after the first batch of the next epoch instead.
        if self._must_stop and not self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._trainer._signal_connector.received_sigterm = True

    # -- replicas with unequal numbers of batches ----------------------------------------------------------------------

    def _telling_of_its_end(self, advance: Callable[..., None]) -> Callable[..., None]:
        """Returns the loop's ``advance``, which tells the other ranks if the loader ends without notice."""

        def telling(*arguments: Any) -> None:
            try:
                advance(*arguments)
            except StopIteration:
                self.ask(has_no_more=True)
                self.hear()
                raise

        return telling

    def _refuse_unequal_data(self) -> None:
        """Raises an error, on all ranks after the same batch of theirs.

        Raises:
            PipelineError: Always.
        """
        loop, mesh = self._trainer.fit_loop.epoch_loop, self._mesh
        found: list[Any] = [None] * mesh.shape.size
        with waiting("comparison of numbers of batches", mesh.host_group):
            dist.all_gather_object(found, (mesh.data_rank, loop.batch_progress.current.ready), group=mesh.host_group)
        counts = ", ".join(f"{count} of replica {replica}" for replica, count in sorted(set(found)))
        raise PipelineError(
            f"the replicas have unequal numbers of training batches: in epoch {self._trainer.current_epoch}, after "
            f"{counts}, the batches of some have come to an end, and those of others have not. Gradients are averaged "
            "over the batches of all replicas, so give all the same number: with a DistributedSampler, which "
            "Trainer(use_distributed_sampler=True) sets for map-style datasets of one length, or by stopping an "
            "iterable dataset after the same number of batches on every rank; or set limit_train_batches to the "
            "smallest number."
        )

    # -- exceptions --------------------------------------------------------------------------------------------------

    def are_together(self) -> bool:
        """Returns whether all ranks have ended after the same batch, so that they can save a checkpoint together.

        Waits for the others, for :data:`GRACE` at most: if only this rank had an exception, they will not come.
        """
        if self._are_together is None:
            self._are_together = not self._mesh.aborted and self._meet()
            if not self._are_together:
                self._mesh.abort()
        return self._are_together

    def give_up(self) -> None:
        """Closes this rank's connections, so that no other rank waits for it, unless all have ended together."""
        self._pending = None
        if not self._are_together:
            self._mesh.abort()

    def _meet(self) -> bool:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress.total
        place = f"{self._run}/{progress.ready}-{progress.processed}-{progress.completed}"
        try:
            store = PatientStore(dist.distributed_c10d._get_default_store())
            if store.add(f"januspipe/end/{place}/count", 1) < self._mesh.shape.size:
                with suppress(dist.DistStoreError):  # timed out
                    store.wait([f"januspipe/end/{place}/all"], min(GRACE, self._mesh.timeout or GRACE))
                    return self._agree(store, place, "yes")
                return self._agree(store, place, "no")
            return self._agree(store, place, "yes")
        except RuntimeError:  # the rank that holds the store has ended
            return False

    def _agree(self, store: Any, place: str, answer: str) -> bool:
        """Returns the answer that the first rank gave, which holds for all ranks."""
        return bool(store.compare_set(f"januspipe/end/{place}/all", "", answer) == b"yes")

    def _guarded(self, callback: Any, on_exception: Callable[..., None]) -> Callable[..., None]:
        def guarded(trainer: Any, module: Any, exception: BaseException) -> None:
            if isinstance(exception, RankLostError):
                self._are_together = False  # nobody has to wait for the others again to know it
            if getattr(callback, "save_on_exception", True) and not self.are_together():
                warnings.warn(
                    f"{type(callback).__name__} saves no checkpoint on {type(exception).__name__}: the ranks have not "
                    "all ended after the same batch, so their parts do not fit together. Resume from the last "
                    "checkpoint that was saved in training.",
                    stacklevel=2,
                )
                return
            on_exception(trainer, module, exception)

        return guarded
