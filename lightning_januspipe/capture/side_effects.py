"""Undoes what the user's step changes when capture runs it."""

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
    """Restores after the block what the user's step may change inside it.

    That is buffers, metrics, attributes of modules (lists that collect outputs, counters, tensors), gradients, and the
    states of random generators. Attributes of other objects are not restored.
    """
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    metrics = metrics_of(module)
    gradients = {p: p.grad for p in module.parameters()}
    known = {id(m) for m in metrics}  # by id: == of two metrics makes a metric
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
_DEEPEST = 4  # containers inside containers that are restored
_NOT_RESTORED = frozenset({*vars(nn.Module()), "log", "forward"})
"""Attributes that are restored in another way, or changed by code around the capture."""


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Callable[[], None] | None]]:
    """Returns the attributes that a step may change, each with a function that restores what it holds."""
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
    """Returns a function that restores a container's entries or a tensor's values; None for values left as they are."""
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
    """Returns the identities of a container's entries; the entries themselves may not be comparable."""
    if isinstance(container, dict):
        return [(id(k), id(v)) for k, v in container.items()]
    return {id(x) for x in container} if isinstance(container, set) else [id(x) for x in container]


@contextmanager
def silent_log(module: nn.Module) -> Iterator[None]:
    """Logs nothing inside the block, because its step runs again later."""

    def log(*_: Any, **__: Any) -> None: ...

    with patched(module, "log", log):
        yield


def metrics_of(module: nn.Module) -> list[Any]:
    """Returns the metrics of torchmetrics in a module."""
    return [m for m in module.modules() if hasattr(m, "_copy_state_dict") and hasattr(m, "_update_count")]


@contextmanager
def kept_metrics(metrics: Sequence[Any]) -> Iterator[None]:
    """Restores metrics after the block that are updated or reset inside it."""
    kept = [_metric_state(m) for m in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            if metric._update_count != state["_update_count"]:
                metric.__dict__.update(state)


def _metric_state(metric: Any) -> dict[str, Any]:
    """Returns a metric's states and counters; of a list only the list is copied, as its entries are never changed."""
    state = {n: getattr(metric, n) for n in (*metric._defaults, "_update_count", "_computed", "_forward_cache")}
    return {n: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v for n, v in state.items()}
