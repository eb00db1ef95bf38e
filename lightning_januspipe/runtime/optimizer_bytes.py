"""Measures the bytes of an optimizer's state before the optimizer has stepped."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_state_bytes(optimizer: Optimizer) -> dict[nn.Parameter, int]:
    """Returns the bytes that an optimizer will keep for each of its parameters that are trained.

    It steps once on a stand-in for one parameter of each shape, so that at most one state is there at a time. The
    optimizer and its parameters stay as they are.

    Args:
        optimizer: The optimizer over the whole module.

    Raises:
        ValueError: The optimizer cannot step on a parameter alone.
    """
    found: dict[nn.Parameter, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        of_shape: dict[tuple[torch.Size, torch.dtype], int] = {}
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            key = parameter.shape, parameter.dtype
            if key not in of_shape:
                of_shape[key] = _state_of_stand_in(optimizer, index, parameter)
            found[parameter] = of_shape[key]
    return found


def _state_of_stand_in(optimizer: Optimizer, index: int, parameter: nn.Parameter) -> int:
    device = "cpu" if parameter.is_meta else parameter.device
    stand_in = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype, device=device))
    stand_in.grad = torch.zeros_like(stand_in)
    other: Any = object.__new__(type(optimizer))
    vars(other).update(vars(optimizer))
    vars(other).pop("step", None)  # schedulers count the steps of the user's optimizer
    other.param_groups = [{**optimizer.param_groups[index], "params": [stand_in]}]
    other.state = defaultdict(dict)
    other._optimizer_step_pre_hooks = OrderedDict()
    other._optimizer_step_post_hooks = OrderedDict()
    try:
        with torch.random.fork_rng(devices=[stand_in.device] if stand_in.is_cuda else []):
            other.step()
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__} cannot step on a single parameter ({type(error).__name__}: {error}), with "
            "which memory_limit counts the bytes of its state. Leave memory_limit out, or use an optimizer that treats "
            "parameters one by one, such as AdamW."
        ) from error
    return sum(_bytes(value) for value in other.state[stand_in].values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
