"""Keeps parameters from being read while their memory is released: an error says so, where torch would crash.

The object stays the same for optimizers, callbacks and modules that hold it, with its shape, its dtype and its
attributes. Only its class changes meanwhile, to a subclass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

_NAME = "_januspipe_name"

_VALUES = frozenset(("data", "T", "H", "mT", "mH", "real", "imag"))
"""Attributes that are made of a tensor's values; all others describe it."""

_DESCRIPTIONS = frozenset(
    (
        *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "is_signed", "untyped_storage"),
        *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__hash__", "__len__"),
    )
)
"""Functions of a tensor that do not read its values."""


class _Released:
    """Refuses everything that reads values."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_attribute = name in ("__get__", "__set__", "__delete__")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if (is_attribute and attribute not in _VALUES) or name in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found = [a for a in torch.utils._pytree.tree_leaves([args, kwargs]) if isinstance(a, _Released)]
        raise RuntimeError(
            f"{vars(found[0])[_NAME] if found else 'a parameter'} has no values between two steps, nor after an "
            'exception: with shard="parameters" each rank keeps a part of them only. Read or change parameters in a '
            'block "with lightning_januspipe.strategy.whole_parameters.whole_parameters(module):", which every rank '
            'has to enter, or train with shard="optimizer".'
        )


@cache
def _released(kind: type[nn.Parameter]) -> type[nn.Parameter]:
    return type(f"Released{kind.__name__}", (_Released, kind), {})


def hide(parameter: nn.Parameter, name: str) -> None:
    """Makes reading a parameter an error, which names it.

    Args:
        parameter: The parameter whose memory is released.
        name: Its name in the user's module.
    """
    if not isinstance(parameter, _Released):
        vars(parameter)[_NAME] = name
        parameter.__class__ = _released(type(parameter))


def show(parameter: nn.Parameter) -> None:
    """Makes a parameter readable again; its memory has to be there."""
    if isinstance(parameter, _Released):
        parameter.__class__ = type(parameter).__mro__[2]
        del vars(parameter)[_NAME]
