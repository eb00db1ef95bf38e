"""Runs the user's step in other contexts, for capture and out of inference mode, and says what the Trainer runs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.runtime.training_length import TrainingLength


def is_fitting(trainer: Any) -> bool:
    """Returns whether the Trainer runs ``fit``."""
    return getattr(trainer.state.fn, "value", trainer.state.fn) == "fit"


def accumulates(trainer: Any) -> bool:
    """Returns whether an optimizer step of the Trainer ever has several batches."""
    schedules = [getattr(callback, "scheduling", {}) for callback in trainer.callbacks]
    return max([trainer.accumulate_grad_batches, *(n for found in schedules for n in found.values())]) > 1


def training_length(trainer: Any) -> TrainingLength:
    """Returns how long training is going to be, as far as the Trainer's limits tell.

    Args:
        trainer: The Trainer, with its loaders.
    """
    epochs = math.inf if trainer.max_epochs in (None, -1) else max(trainer.max_epochs, 1) - trainer.current_epoch
    left = max(epochs * trainer.num_training_batches, 0.0)
    if trainer.max_steps != -1:
        left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    timers = [callback.time_remaining() for callback in trainer.callbacks if hasattr(callback, "time_remaining")]
    return TrainingLength(left, min((time for time in timers if time is not None), default=math.inf))


@contextmanager
def training_mode(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Puts a module into training mode, if wanted: many potentials detach their forces in evaluation mode."""
    modes = {m: m.training for m in module.modules()}
    try:
        if wanted:
            module.train()
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def unlogged(trainer: Any, substitute: Callable[[], Any]) -> Iterator[None]:
    """Replaces the Trainer's loggers, so that nothing is logged by a step that runs for capture only.

    Args:
        trainer: The Trainer whose loggers are replaced.
        substitute: Makes a logger that ignores what it is given.
    """
    loggers = trainer.loggers
    trainer.loggers = [substitute() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def differentiable() -> Iterator[None]:
    """Leaves the Trainer's inference mode, in which autograd fails even under ``enable_grad``."""
    with torch.inference_mode(False):
        yield


def without_inference(value: Any) -> Any:
    """Returns the same batch with tensors that autograd accepts, although it was made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(without_inference(v) for v in value))
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed.update({k: without_inference(v) for k, v in value.items()})
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{n: without_inference(getattr(value, n)) for n in fields})
    if isinstance(value, (list, tuple)):
        return type(value)(without_inference(v) for v in value)
    if hasattr(value, "apply") and not isinstance(value, nn.Module):  # PyG data
        return value.apply(without_inference)
    return value
