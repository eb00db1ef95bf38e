"""What all ranks do together: get what one rank found or its error, and start with the same parameters."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Result = TypeVar("_Result")


def on_first_rank(function: Callable[[], _Result], rank: int, broadcast: Callable[[Any], Any]) -> _Result:
    """Calls a function on rank 0; returns its result, or raises its error, on every rank.

    Args:
        function: Called on rank 0.
        rank: This rank.
        broadcast: Returns an object of rank 0 on all ranks.

    Raises:
        ValueError: The result cannot be pickled.
    """
    result: Any = None
    content = b""
    if rank == 0:
        try:
            result = function()
            content = _pickled(result)
        except Exception as error:  # raised again on every rank
            result = portable(error)
            content = pickle.dumps(result)
    content = broadcast(content)
    if rank != 0:
        with warnings.catch_warnings():  # unpickling a pytree's spec warns about its own class
            warnings.filterwarnings("ignore", category=FutureWarning)
            result = pickle.loads(content)
    if isinstance(result, Exception):
        raise result
    return result


def on_every_rank(function: Callable[[], _Result], gathered: Callable[[Any], list[Any]]) -> _Result:
    """Calls a function on every rank and returns its result; if it fails on one rank, there is an error on all.

    Args:
        function: Called on every rank; it must not wait for other ranks.
        gathered: Returns an object of every rank on all ranks.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failed = [e for e in gathered(error and portable(error)) if e is not None]
    if failed:
        raise error or failed[0]
    return result


def _pickled(result: Any) -> bytes:
    """Pickles a result; if it failed in broadcasting instead, the other ranks would wait for this one."""
    try:
        return pickle.dumps(result)
    except Exception as error:  # objects may refuse in any way
        raise ValueError(
            f"what the first rank found cannot be sent to the others: {type(error).__name__}: {error}. Objects that a "
            "potential is called with or returns have to be such that pickle takes them: define their classes and "
            "functions at module level, or give it tensors instead."
        ) from error


def portable(error: Exception) -> Exception:
    """Returns an error that survives pickling: of an error of a foreign type only the message does."""
    known = type(error).__module__.split(".")[0] in ("builtins", "lightning_januspipe")
    return error if known and len(error.args) == 1 else RuntimeError(f"{type(error).__name__}: {error}")


_CHUNK = 2**26
"""Bytes that are broadcast at once."""


def broadcast_module(module: nn.Module, device: torch.device) -> None:
    """Gives every rank the parameters and buffers of global rank 0, as data-parallel training does at its start.

    Args:
        module: The module; its tensors may be on the CPU.
        device: This rank's device, for the messages.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.numel()]
    for same in _chunks(tensors):
        flat = torch.cat([t.detach().reshape(-1).to(device) for t in same])
        dist.broadcast(flat, 0)
        for tensor, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.data.copy_(values.view_as(tensor))


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chunk: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            chunk.append(tensor)
            if sum(t.numel() * t.element_size() for t in chunk) >= _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
