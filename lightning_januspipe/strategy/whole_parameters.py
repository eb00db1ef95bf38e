"""Gives hooks and callbacks the values of parameters that are in shards between steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning_januspipe.runtime.runner import Runner


@contextmanager
def whole_parameters(module: Any) -> Generator[None, None, None]:
    """Gathers the parameters of this rank's stages.

    With ``shard="parameters"`` they are in shards between steps. With ``expert_size`` > 1 a rank has its own experts
    only; their gradients are put aside until the block ends.

    Every rank has to enter the block. Parameters may be changed inside, in the same way on all ranks. Under other
    strategies the block does nothing.

    Args:
        module: The LightningModule.

    Example:
        >>> def on_train_batch_end(self, *args):
        ...     with whole_parameters(self):
        ...         self.log("scale", self.potential.scale.norm())
    """
    runner: Runner | None = getattr(module.trainer.strategy, "runner", None)
    if runner is None:
        yield
        return
    runner.parameters.make_whole()
    had_own = runner.parameters.make_experts_whole()
    yield
    runner.parameters.unshard()  # takes in what the block has changed
    if had_own:
        runner.parameters.keep_own_experts()
