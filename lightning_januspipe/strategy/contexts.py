"""Around the capture of a potential: one rank does it, in the right modes, and all get the result or the error."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_fitting(trainer: Any) -> bool:
    """Whether the Trainer runs ``fit``."""
    return getattr(trainer.state.fn, "value", trainer.state.fn) == "fit"


@contextmanager
def training_mode(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Put a module into training mode, if wanted: many potentials detach their forces otherwise."""
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
    """What a step gives to its loggers by hand goes nowhere: the step is run for capture only.

    Args:
        trainer: the Trainer.
        substitute: makes a logger that takes everything.
    """
    loggers = trainer.loggers
    trainer.loggers = [substitute() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def differentiable() -> Iterator[None]:
    """Leave the Trainer's inference mode, in which autograd fails also under enable_grad."""
    with torch.inference_mode(False):
        yield


def without_inference(value: Any) -> Any:
    """The same batch with tensors that autograd accepts."""
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
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(without_inference(v) for v in value)
    if hasattr(value, "apply") and not isinstance(value, nn.Module):  # PyG data
        return value.apply(without_inference)
    return value
