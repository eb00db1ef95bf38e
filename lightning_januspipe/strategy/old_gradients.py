"""Frees the gradients of the last step before the next one needs memory for its own."""

from __future__ import annotations

from typing import Any

_HOOKS = ("on_before_zero_grad", "optimizer_zero_grad")


def free_old_gradients(trainer: Any) -> None:
    """Frees gradients that the Trainer is about to zero, unless a hook may look at them before.

    Lightning zeroes gradients between ``training_step`` and the backward pass. All phases run in ``training_step``, so
    that the gradients of two steps would be in memory together.

    Args:
        trainer: The Trainer, at the start of a training step.
    """
    if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
        return  # gradients are accumulated
    if any(_has_own(owner, hook) for owner in (trainer.lightning_module, *trainer.callbacks) for hook in _HOOKS):
        return
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _has_own(owner: Any, hook: str) -> bool:
    """Returns whether a hook of a module or of a callback is not Lightning's own."""
    defining = next((kind for kind in type(owner).__mro__ if hook in vars(kind)), object)
    of_lightning = defining is object or defining.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return hook in vars(owner) or not of_lightning
