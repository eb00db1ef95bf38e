"""Around the capture of a potential: one rank does it, in the right modes, and all get the result or the error."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

_Result = TypeVar("_Result")


def on_first_rank(function: Callable[[], _Result], rank: int, broadcast: Callable[[Any], Any]) -> _Result:
    """What a function returns on rank 0, on every rank; its error is raised on every rank too.

    Args:
        function: called on rank 0.
        rank: this rank.
        broadcast: gives an object of rank 0 to all ranks.
    """
    result: Any = None
    content = b""
    if rank == 0:
        try:
            result = function()
            content = _pickled(result)
        except Exception as error:  # raised again on every rank
            result = _portable(error)
            content = pickle.dumps(result)
    content = broadcast(content)
    if rank != 0:
        with warnings.catch_warnings():  # unpickling a pytree's spec warns about its own class
            warnings.filterwarnings("ignore", category=FutureWarning)
            result = pickle.loads(content)
    if isinstance(result, Exception):
        raise result
    return result


def _pickled(result: Any) -> bytes:
    """A result as it is sent; if broadcasting failed instead, the other ranks would wait for this one."""
    try:
        return pickle.dumps(result)
    except Exception as error:  # objects may refuse in any way
        raise ValueError(
            f"what the first rank found cannot be sent to the others: {type(error).__name__}: {error}. Objects that a "
            "potential is called with or returns have to be such that pickle takes them: define their classes and "
            "functions at module level, or give it tensors instead."
        ) from error


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


def with_batch(step: Callable[..., Any]) -> Callable[[Any], Any]:
    """A step of the user as a function of the batch alone; indices are given by position, as Lightning does."""
    following = list(inspect.signature(step).parameters.values())[1:3]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    indices = [
        0
        for p in following
        if p.kind is inspect.Parameter.VAR_POSITIONAL
        or (p.kind in positional and (p.default is p.empty or p.name in ("batch_idx", "dataloader_idx")))
    ]
    return lambda batch: step(batch, *indices)


def _portable(error: Exception) -> Exception:
    """An error that survives pickling: of foreign types only the message does."""
    known = type(error).__module__.split(".")[0] in ("builtins", "lightning_januspipe")
    return error if known and len(error.args) == 1 else RuntimeError(f"{type(error).__name__}: {error}")
