"""Saves, restores, seeds and shares the random generators of torch, numpy and Python together."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_CPU = torch.device("cpu")
_MOST_OBJECTS, _MOST_ENTRIES, _DEEPEST = 1000, 50, 6
"""How far generators are searched: objects, entries of a container, levels."""


def random_state(device: torch.device = _CPU) -> dict[str, Any]:
    """Returns the states of all generators, of types that ``torch.load(weights_only=True)`` reads.

    Args:
        device: A CUDA device whose generator counts too.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device = _CPU) -> None:
    """Sets all generators to what :func:`random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def broadcast_random_state(source: int, group: dist.ProcessGroup | None) -> None:
    """Gives all ranks of a group the states of one of them, but for generators of CUDA devices.

    Args:
        source: Global rank whose states all take over.
        group: The ranks; all of them have to call this.
    """
    states = [random_state()]
    dist.broadcast_object_list(states, source, group=group)
    set_random_state(states[0])


@contextmanager
def kept_random_state(*holders: object) -> Iterator[None]:
    """Undoes what is drawn inside the block.

    Args:
        holders: Objects whose own generators are kept too, such as a dataset.
    """
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else _CPU
    state, restorers = random_state(device), [_restorer(g) for g in _generators_in(holders)]
    try:
        yield
    finally:
        set_random_state(state, device)
        for restore in restorers:
            restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds all generators inside the block; after it they go on as if nothing had been drawn."""
    with kept_random_state():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # before, torch would note a traceback for each seed, which takes a millisecond
            torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


def _generators_in(value: Any) -> list[Any]:
    """Finds random number generators among the attributes of objects, and in what they hold, nearest first."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = deque([(value, 0)])
    while todo and len(seen) < _MOST_OBJECTS:
        item, depth = todo.popleft()
        parts: Iterable[Any] = ()
        if id(item) in seen or depth > _DEEPEST:
            continue
        seen.add(id(item))
        if isinstance(item, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            parts = islice(item.values() if isinstance(item, Mapping) else item, _MOST_ENTRIES)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType, Tensor, nn.Module)):
            parts = vars(item).values()
        todo.extend((part, depth + 1) for part in parts)
    return found


def _restorer(generator: Any) -> Callable[[], None]:
    """Returns a function that sets a generator back to its present state."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())
