"""Sizes that a forward takes from data or from ``len``: kept symbolic while tracing.

``int(index.max()) + 1`` is a number that a trace would make a constant, and ``len(features)`` too. While a potential is
traced, ``int`` and ``len`` mean functions of this module in the source files of its package, and a mode sees
``Tensor.item``. An integer read from a tensor becomes an input of the traced program, as the length of an empty tensor,
and the tensor that it is read from an output: the value is computed again for every batch.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.find.call_format import size_carrier
from lightning_januspipe.capture.trees import children

_UNTOUCHED = {
    *("lightning_januspipe", "torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("numpy", *sys.stdlib_module_names),
}
# Libraries whose functions models call: they take sizes from data where none is given.
_LIBRARIES = {"torch_geometric", "torch_scatter"}


class DataSizes:
    """Integers read from tensors, in the order of the forward.

    Attributes:
        values: them, on the batch of the first run.
        sources: the tensors that they were read from, in the last run.
    """

    def __init__(self) -> None:
        self.values: list[int] = []
        self.sources: list[Tensor] = []
        self._carriers: Sequence[Tensor] | None = None

    def carriers(self, device: torch.device) -> list[Tensor]:
        """Inputs that carry the values."""
        return [size_carrier(v, device) for v in self.values]

    def begin(self, carriers: Sequence[Tensor] | None) -> None:
        """Before a run: values are recorded, or where carriers are given, replaced by their lengths."""
        self.sources, self._carriers = [], carriers
        if carriers is None:
            self.values = []

    def take(self, source: Tensor) -> Any:
        """The integer in a tensor with one element."""
        self.sources.append(source)
        if self._carriers is None:
            with torch._C.DisableTorchFunction():  # else SeenItems would see this reading too
                self.values.append(builtins.int(source.item()))
            return self.values[-1]
        assert len(self.sources) <= len(self._carriers), "the forward reads more integers when it is traced"
        return self._carriers[len(self.sources) - 1].shape[0]


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool) and tensor.numel() == 1


class SeenItems(TorchFunctionMode):
    """Sees ``tensor.item()`` of integers."""

    def __init__(self, sizes: DataSizes) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item and _is_integer(args[0]):
            return self._sizes.take(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def symbolic_sizes(potential: nn.Module, arguments: Any, sizes: DataSizes) -> Iterator[None]:
    """Inside, sizes stay symbolic through ``int``, ``len`` and ``Tensor.item``.

    That holds in the packages that define the potential, its parts and its arguments, and in PyTorch Geometric.

    Args:
        potential: the module that is run inside.
        arguments: those of its call.
        sizes: gets the integers that are read from tensors.
    """

    class Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (builtins.int, torch.SymInt))

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, builtins.int)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs:
                (value,) = args
                if isinstance(value, torch.SymInt):
                    return value
                if isinstance(value, torch.SymFloat):
                    return torch.sym_int(value)
                if isinstance(value, Tensor) and _is_integer(value):
                    return sizes.take(value)
            return builtins.int(*args, **kwargs)

    class SymbolicInt(builtins.int, metaclass=Meta):
        pass

    def symbolic_len(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)

    shims = {"int": SymbolicInt, "len": symbolic_len}
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for module in _modules_of(potential, arguments):
            for name, shim in shims.items():
                if name not in vars(module):
                    vars(module)[name] = shim
                    changed.append((vars(module), name))
        with SeenItems(sizes):
            yield
    finally:
        for names, name in changed:
            del names[name]


def _modules_of(potential: nn.Module, arguments: Any) -> list[Any]:
    """Source files of the packages that define the potential, its parts and the objects in its arguments."""
    classes = {c for m in potential.modules() for c in type(m).__mro__}
    classes |= {c for x in _objects(arguments) for c in type(x).__mro__}
    packages = {c.__module__.split(".")[0] for c in classes} - _UNTOUCHED | _LIBRARIES
    return [m for n, m in list(sys.modules.items()) if n.split(".")[0] in packages and hasattr(m, "__dict__")]


def _objects(tree: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Containers in a tree."""
    parts = children(tree) if id(tree) not in within else None
    if parts is not None:
        yield tree
        for _, part in parts:
            yield from _objects(part, (*within, id(tree)))
