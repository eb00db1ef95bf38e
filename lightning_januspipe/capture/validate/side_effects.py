"""Capture runs the user's step a few times, and leaves nothing of it behind."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.patches import patched
from lightning_januspipe.random_state import kept_random_state


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, the user's step may be run; all that a step may change is put back.

    That is buffers, metrics, attributes of modules (lists that collect outputs, counters, tensors), gradients, random
    numbers. What objects of other classes hold is left.
    """
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    metrics = metrics_of(module)
    gradients = {p: p.grad for p in module.parameters()}
    known = {id(m) for m in metrics}  # metrics are not compared by ==, of which they make a metric
    attributes = {m: _attributes(m) for m in module.modules() if id(m) not in known}
    with kept_random_state(), silent_log(module), kept_metrics(metrics):
        try:
            yield
        finally:
            for owner, kept in attributes.items():
                _restore_attributes(owner, kept)
            for name, buffer in module.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


_CONTAINERS = (list, dict, set, deque)
_DEEPEST = 4
_NOT_RESTORED = frozenset({*vars(nn.Module()), "log", "forward"})
"""What is put back in another way, or is changed by what surrounds the capture."""


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Callable[[], None] | None]]:
    """Attributes that a step may change, each with a function that puts back what it holds."""
    return {n: (v, _restorer(v)) for n, v in vars(module).items() if n not in _NOT_RESTORED}


def _restore_attributes(module: nn.Module, kept: dict[str, tuple[Any, Callable[[], None] | None]]) -> None:
    for name in [n for n in vars(module) if n not in _NOT_RESTORED and n not in kept]:
        del vars(module)[name]
    for name, (value, restore) in kept.items():
        if vars(module).get(name, module) is not value:
            vars(module)[name] = value
        if restore is not None:
            restore()


def _restorer(value: Any, depth: int = 0) -> Callable[[], None] | None:
    """A function that gives a container the entries, or a tensor the values, that it has now; None for what is left."""
    if isinstance(value, Tensor):
        if value.requires_grad or value.is_inference():
            return None
        return partial(_restore_tensor, value, value._version, value.clone())
    if not isinstance(value, _CONTAINERS) or depth > _DEEPEST:
        return None
    entries = value.values() if isinstance(value, dict) else () if isinstance(value, set) else value
    inner = [restore for restore in (_restorer(entry, depth + 1) for entry in entries) if restore is not None]
    return partial(_restore_container, value, copy.copy(value), inner)


def _restore_tensor(tensor: Tensor, version: int, values: Tensor) -> None:
    if tensor._version != version:
        tensor.copy_(values)


def _restore_container(container: Any, held: Any, inner: list[Callable[[], None]]) -> None:
    if _entries(container) != _entries(held):
        container.clear()
        container.extend(held) if isinstance(container, (list, deque)) else container.update(held)
    for restore in inner:
        restore()


def _entries(container: Any) -> Any:
    """What tells the entries of one container from those of another, which may not be comparable."""
    if isinstance(container, dict):
        return [(id(k), id(v)) for k, v in container.items()]
    return {id(x) for x in container} if isinstance(container, set) else [id(x) for x in container]


@contextmanager
def silent_log(module: nn.Module) -> Iterator[None]:
    """Nothing is logged inside the block: its step is run again later."""

    def log(*_: Any, **__: Any) -> None: ...

    with patched(module, "log", log):
        yield


def metrics_of(module: nn.Module) -> list[Any]:
    """The metrics of torchmetrics in a module."""
    return [m for m in module.modules() if hasattr(m, "_copy_state_dict") and hasattr(m, "_update_count")]


@contextmanager
def kept_metrics(metrics: Sequence[Any]) -> Iterator[None]:
    """Metrics that are updated or reset inside the block are as before after it."""
    kept = [_metric_state(m) for m in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            if metric._update_count != state["_update_count"]:
                metric.__dict__.update(state)


def _metric_state(metric: Any) -> dict[str, Any]:
    """A metric's states and counters; of lists the entries, which are not changed in place."""
    state = {n: getattr(metric, n) for n in (*metric._defaults, "_update_count", "_computed", "_forward_cache")}
    return {n: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v for n, v in state.items()}
