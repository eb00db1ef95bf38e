"""Capture runs the user's step a few times, and leaves nothing of it behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.step import kept_random_state, silent_log


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Inside, the user's step may be run; all that a step may change is put back.

    That is buffers, metrics, attributes of modules (lists that collect outputs, counters), gradients, random numbers.
    """
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    metrics = {m: _metric_state(m) for m in module.modules() if hasattr(m, "_copy_state_dict")}
    gradients = {p: p.grad for p in module.parameters()}
    attributes = {m: _attributes(m) for m in module.modules() if m not in metrics}
    with kept_random_state(), silent_log(module):
        try:
            yield
        finally:
            for owner, kept in attributes.items():
                _restore_attributes(owner, kept)
            for name, buffer in module.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
            for metric, state in metrics.items():
                metric.__dict__.update(state)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


_CONTAINERS = (list, dict, set)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Public attributes that a step may change, containers with what they hold."""
    names = [n for n in vars(module) if not n.startswith("_") and n not in ("training", "log", "forward")]
    values = {n: vars(module)[n] for n in names}
    return {n: (v, copy.copy(v)) if isinstance(v, _CONTAINERS) else (v, None) for n, v in values.items()}


def _restore_attributes(module: nn.Module, kept: dict[str, Any]) -> None:
    for name in [n for n in vars(module) if not n.startswith("_") and n not in ("training", "log", "forward")]:
        if name not in kept:
            del vars(module)[name]
    for name, (value, held) in kept.items():
        vars(module)[name] = value
        if held is not None and len(value) != len(held):
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)


def _metric_state(metric: Any) -> dict[str, Any]:
    """A torchmetrics metric's states and counters."""
    kept = {**metric._copy_state_dict()}
    for name in ("_update_count", "_computed", "_forward_cache"):
        if name in metric.__dict__:
            kept[name] = metric.__dict__[name]
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
