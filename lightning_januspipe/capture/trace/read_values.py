"""Handles numbers and truth values that a forward reads from tensors, and sizes from ``len``, while it is traced.

A trace would make ``int(index.max()) + 1`` a constant, and ``len(features)`` too. While a potential is traced,
``int`` and ``len`` stand for functions of this module in the source files of its package, and a mode sees every value
that is read from a tensor. An integer that is read becomes an input of the traced program, as the length of an empty
tensor. The tensor that it is read from becomes an output, so that the integer can be computed for every batch.

Truth values (``if mask.all()``), floating-point numbers, and integers that depend on no tensor of the call, such as
those in buffers, are constants of the trace. They are recorded as :class:`FixedValue`: every batch has to give the same
values.
"""

from __future__ import annotations

import builtins
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lightning_januspipe.capture.find.call_format import size_carrier
from lightning_januspipe.capture.trace.fixed_values_and_draws import FixedValue
from lightning_januspipe.capture.trace.trace_in_progress import depends_on
from lightning_januspipe.capture.trees import children
from lightning_januspipe.errors import CaptureError

_UNTOUCHED = {
    *("lightning_januspipe", "torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric"),
    *("numpy", *sys.stdlib_module_names),
}
# Libraries that models call, and that take sizes from data where none is given.
_LIBRARIES = {"torch_geometric", "torch_scatter"}


class ReadValues:
    """Records the values that a forward reads from tensors, in their order.

    The forward runs twice: the first run records the values, and the second one, the trace, gets them again.

    Args:
        potential: the module with this forward.

    Attributes:
        sizes: integers, on the batch of the first run.
        size_sources: the tensors that the integers were read from, in the last run, without the constants.
        fixed: all other values.
        fixed_sources: the tensors that the other values were read from, in the last run.
        constants: position among the sizes -> fixed value, for the integers that are the same for every batch, as the
            trace tells: it shows what each value is computed from.
        constant_sources: the tensors that the constants were read from, in the trace.
    """

    def __init__(self, potential: nn.Module) -> None:
        self.sizes: list[int] = []
        self.size_sources: list[Tensor] = []
        self.fixed: list[FixedValue] = []
        self.fixed_sources: list[Tensor] = []
        self.constants: dict[int, FixedValue] = {}
        self.constant_sources: list[Tensor] = []
        self._inputs: Sequence[Tensor] = ()
        self._carriers: Sequence[Tensor] | None = None
        self._are_sizes: list[bool] = []  # for each value read, in order
        self._num_read = 0
        self._buffers = {b.untyped_storage().data_ptr() for b in potential.buffers() if b.device.type != "meta"} - {0}

    def carriers(self, device: torch.device) -> list[Tensor]:
        """Returns inputs that carry the sizes."""
        return [size_carrier(v, device) for v in self.sizes]

    def begin(self, inputs: Sequence[Tensor] | None) -> None:
        """Starts a run, in which values are recorded, or replaced by recorded ones.

        Args:
            inputs: the inputs of the trace, of which the last ones carry sizes; None to record values.
        """
        self.size_sources, self.fixed_sources, self._num_read = [], [], 0
        self.constants, self.constant_sources = {}, []
        if inputs is None:
            self.sizes, self.fixed, self._are_sizes, self._inputs, self._carriers = [], [], [], (), None
        else:
            self._inputs, self._carriers = inputs, inputs[len(inputs) - len(self.sizes) :]

    def take(self, source: Tensor) -> Any:
        """Returns the integer in a tensor with one element: a size, or a constant if it depends on no input."""
        if self._carriers is None and source.untyped_storage().data_ptr() in self._buffers:
            return self.observe(source)
        if self._carriers is not None and not self._next_is_size():
            return self.observe(source)
        self._num_read += 1
        source = source.reshape(())
        if self._carriers is None:
            self._are_sizes.append(True)
            self.sizes.append(_read(source))
            return self.sizes[-1]
        position = len(self.size_sources) + len(self.constants)
        if depends_on(source, self._inputs):
            self.size_sources.append(source)
            return self._carriers[position].shape[0]
        self.constants[position] = FixedValue(self.sizes[position], _place())
        self.constant_sources.append(source)
        return self.sizes[position]

    def observe(self, source: Tensor) -> Any:
        """Records the value of a tensor, or its values as nested lists, as a fixed value, and returns it.

        Raises:
            CaptureError: the tensor has a value for each structure, atom or edge.
        """
        place = _place()
        if any(isinstance(s, torch.SymInt) and not s.node.expr.is_number for s in source.shape):
            raise CaptureError(
                "the forward reads a list of values from a tensor whose size changes from batch to batch, for "
                f"a loop over structures, or over atoms or edges, in Python ({place}). A trace would repeat the loop "
                "as many times as this batch has entries. Compute all of them together (index_add, repeat_interleave, "
                "torch.bmm), or write an adapter that does."
            )
        self._num_read += 1
        self.fixed_sources.append(source)
        if self._carriers is None:
            self._are_sizes.append(False)
            self.fixed.append(FixedValue(_read(source), place))
        self._next_is_size(-1)
        return self.fixed[len(self.fixed_sources) - 1].value

    def _next_is_size(self, offset: int = 0) -> bool:
        if self._num_read + offset >= len(self._are_sizes):
            raise CaptureError(
                f"the traced forward reads a value from a tensor that the forward itself does not read ({_place()})"
            )
        return self._are_sizes[self._num_read + offset]


def _read(source: Tensor) -> Any:
    with torch._C.DisableTorchFunction():  # so that TensorReads does not see this read
        return torch._C.TensorBase.tolist(source)


def line_of_user(frames: Iterable[traceback.FrameSummary]) -> str:
    """Returns the innermost line of code that is neither torch's nor this package's; empty if there is none."""
    ours = (f"{os.path.dirname(torch.__file__)}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}", "<")
    found = [f"{f.filename}:{f.lineno}, {f.line!r}" for f in frames if not f.filename.startswith(ours)]
    return found[-1] if found else ""


def _place() -> str:
    return line_of_user(traceback.extract_stack()) or "an unknown line"


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool) and tensor.numel() == 1


_SINGLE = {Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.is_nonzero, torch.is_nonzero}
_COMPARISONS: dict[Any, Callable[..., Tensor]] = {
    torch.equal: torch.eq,
    Tensor.equal: torch.eq,
    torch.allclose: torch.isclose,
    Tensor.allclose: torch.isclose,
}


class TensorReads(TorchFunctionMode):
    """Records values that are read from tensors with ``item``, ``bool``, ``float``, ``torch.equal`` and the like."""

    def __init__(self, values: ReadValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item and _is_integer(args[0]):
            return self._values.take(args[0])
        if func is Tensor.__getitem__:
            return func(args[0], self._read_index(args[1]))
        if func in _SINGLE and args[0].numel() == 1:
            found = self._values.observe(args[0].reshape(()))
            return found if func is Tensor.item else float(found) if func is Tensor.__float__ else bool(found)
        if func in _COMPARISONS and args[0].dim() == args[1].dim():
            return bool(self._values.observe(_COMPARISONS[func](*args, **kwargs).all()))
        return func(*args, **kwargs)

    def _read_index(self, index: Any) -> Any:
        """Returns an index with integers in the place of tensors of one integer, which export reads in this order."""

        def read(item: Any) -> Any:
            if isinstance(item, slice):
                return slice(read(item.start), read(item.stop), read(item.step))
            is_read = isinstance(item, Tensor) and item.dim() == 0 and _is_integer(item)
            return self._values.take(item) if is_read else item

        return tuple(map(read, index)) if isinstance(index, tuple) else read(index)


@contextmanager
def _seen_lists(values: ReadValues) -> Iterator[None]:
    """Records values that are read with ``tolist``, which calls no mode, inside the block."""

    def tolist(tensor: Tensor) -> Any:
        if not any(isinstance(mode, TensorReads) for mode in _get_current_function_mode_stack()):
            return torch._C.TensorBase.tolist(tensor)  # inside of an operation
        return values.take(tensor) if tensor.dim() == 0 and _is_integer(tensor) else values.observe(tensor)

    classes: list[Any] = [c for c in (Tensor, FakeTensor, FunctionalTensor) if c is Tensor or "tolist" in vars(c)]
    own = {c: vars(c).get("tolist") for c in classes}
    for c in classes:
        c.tolist = tolist
    try:
        yield
    finally:
        for c, function in own.items():
            if function is None:
                del c.tolist
            else:
                c.tolist = function


@contextmanager
def symbolic_sizes(potential: nn.Module, arguments: Any, values: ReadValues) -> Iterator[None]:
    """Keeps sizes symbolic through ``int``, ``len`` and ``Tensor.item`` inside the block, and records other values.

    ``int`` and ``len`` are replaced in the packages that define the potential, its parts and its arguments, and in
    PyTorch Geometric.

    Args:
        potential: the module that runs inside the block.
        arguments: the arguments of its call.
        values: gets the values that are read from tensors.
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
                    return values.take(value)
                if isinstance(value, Tensor) and value.numel() == 1:
                    return builtins.int(values.observe(value.reshape(())))
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
        with TensorReads(values), _seen_lists(values):
            yield
    finally:
        for names, name in changed:
            del names[name]


def _modules_of(potential: nn.Module, arguments: Any) -> list[Any]:
    """Returns the Python modules of the packages that define a potential, its parts and its arguments."""
    classes = {c for m in potential.modules() for c in type(m).__mro__}
    classes |= {c for x in _objects(arguments) for c in type(x).__mro__}
    packages = {c.__module__.split(".")[0] for c in classes} - _UNTOUCHED | _LIBRARIES
    return [m for n, m in list(sys.modules.items()) if n.split(".")[0] in packages and hasattr(m, "__dict__")]


def _objects(tree: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Yields the containers in a tree."""
    parts = children(tree) if id(tree) not in within else None
    if parts is not None:
        yield tree
        for _, part in parts:
            yield from _objects(part, (*within, id(tree)))


@contextmanager
def eager_branches(potential: nn.Module, arguments: Any) -> Iterator[None]:
    """Lets ``torch.compiler.is_compiling()`` and the like return False to callers outside torch, inside the block.

    So the trace is one of the forward as it runs without a compiler, which the stages are compared with.

    Args:
        potential: the module that is traced inside the block.
        arguments: the arguments of its call.
    """
    asked = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting", "is_dynamo_compiling")}
    names_of = {function: name for name, function in asked.items()}
    changed: list[tuple[dict[str, Any], str, Any]] = []

    def answer(function: Callable[[], bool]) -> Callable[[], bool]:
        def asked_by() -> bool:
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            return function() if caller.partition(".")[0] == "torch" else False

        return asked_by

    answers = {name: answer(function) for name, function in asked.items()}
    modules = [torch.compiler, torch._dynamo, *_modules_of(potential, arguments)]
    places: list[dict[str, Any]] = [module.__dict__ for module in modules]
    try:
        for names in places:
            for name, value in list(names.items()):
                if isinstance(value, types.FunctionType) and value in names_of:
                    changed.append((names, name, value))
                    names[name] = answers[names_of[value]]
        yield
    finally:
        for names, name, value in changed:
            names[name] = value
