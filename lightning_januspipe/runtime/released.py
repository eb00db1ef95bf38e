"""Keeps parameters from being read while their memory is released, and gradients while they are in shards.

An error says so, where torch would crash, or where code of the user would see a part of the gradients only.

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
_GUARDED = "_januspipe_gradient_is_elsewhere"

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
        if is_attribute and attribute == "grad" and _GUARDED in vars(args[0]):
            raise _no_gradient(args[0])
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


class _Guarded:
    """Refuses to tell or take a gradient."""

    @property
    def grad(self) -> Any:
        """Raises an error."""
        raise _no_gradient(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        raise _no_gradient(self)


def _no_gradient(parameter: Any) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {vars(parameter)[_GUARDED]} is in parts after the backward pass: with sharded state each "
        "rank has its part only, in the gradients of the parameters of the optimizer's groups. Read and change them "
        "there, element by element; lightning_januspipe.strategy.gradient_norm.grad_norm gives the norms of whole "
        'gradients. Or train with shard="none".'
    )


@cache
def _guarded(kind: type[nn.Parameter]) -> type[nn.Parameter]:
    return type(f"Sharded{kind.__name__}", (_Guarded, kind), {})


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
        if isinstance(parameter, _Guarded):
            parameter.__class__ = type(parameter).__mro__[2]
        vars(parameter)[_NAME] = name
        parameter.__class__ = _released(type(parameter))


def show(parameter: nn.Parameter) -> None:
    """Makes a parameter readable again; its memory has to be there."""
    if isinstance(parameter, _Released):
        kind = type(parameter).__mro__[2]
        del vars(parameter)[_NAME]
        parameter.__class__ = _guarded(kind) if _GUARDED in vars(parameter) else kind


def guard_gradient(parameter: nn.Parameter, name: str) -> None:
    """Makes reading or setting a parameter's gradient an error, which names it.

    Args:
        parameter: The parameter whose gradient is in shards.
        name: Its name in the user's module.
    """
    vars(parameter)[_GUARDED] = name
    if not isinstance(parameter, (_Released, _Guarded)):
        parameter.__class__ = _guarded(type(parameter))


def has_gradient_elsewhere(parameter: nn.Parameter) -> bool:
    """Returns whether reading or setting a parameter's gradient is an error."""
    return _GUARDED in vars(parameter)


def allow_gradient(parameter: nn.Parameter) -> None:
    """Makes a parameter's gradient readable again."""
    vars(parameter).pop(_GUARDED, None)
    if isinstance(parameter, _Guarded):
        parameter.__class__ = type(parameter).__mro__[2]
