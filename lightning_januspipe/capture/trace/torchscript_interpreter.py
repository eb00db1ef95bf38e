"""Interprets the graphs of TorchScript node by node, so that a trace sees their operators and symbolic sizes.

The tables below hold the nodes of the language, arithmetic with plain numbers, and operators that turn tensors into
numbers. Every other node calls an operator of the dispatcher. A node that would make a constant of a symbolic size is
refused.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_januspipe.errors import CaptureError

_DTYPES = {
    **dict(enumerate((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))),
    **dict(enumerate((torch.float16, torch.float32, torch.float64), 5)),
    **dict(enumerate((torch.complex32, torch.complex64, torch.complex128, torch.bool), 8)),
    15: torch.bfloat16,
}
"""TorchScript's integer for each dtype; operators of the dispatcher take these integers."""

_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_NUMBERS: dict[Any, int] = {torch.strided: 0}
_NUMBERS |= {dtype: number for number, dtype in _DTYPES.items()} | {x: number for number, x in enumerate(_FORMATS)}


def interpret(callee: Any, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a ScriptFunction or a ScriptMethod by interpreting its graph.

    Args:
        callee: the function or method; the first argument of a method is the module, or what stands for it.
        where: the function or module that the graph belongs to, for errors.
        args: positional arguments.
        kwargs: arguments by name.
    """
    arguments = callee.schema.arguments
    given = dict(zip([a.name for a in arguments], args, strict=False))
    unknown = set(kwargs) - {a.name for a in arguments[len(args) :]}
    missing = [a.name for a in arguments if a.name not in {*given, *kwargs} and not a.has_default_value()]
    if unknown or missing or len(args) > len(arguments):
        raise TypeError(f"{where}: {callee.schema} was called with {len(args)} arguments and {sorted(kwargs)}")
    given.update(kwargs)
    graph = callee.inlined_graph
    run = _GraphRun(where)
    for value, argument in zip(graph.inputs(), arguments, strict=True):
        taken = given.get(argument.name, argument.default_value)
        run.values[value.debugName()] = _from_python(taken, argument.type)
    (result,) = run.block(graph)
    return _materialized(result)


def _from_python(value: Any, kind: Any) -> Any:
    """Returns an argument as TorchScript sees it: lists copied, integers widened to floats, dtypes as integers."""
    name = kind.kind()
    if name == "OptionalType":
        return None if value is None else _from_python(value, kind.getElementType())
    if name == "ListType":
        return [_from_python(x, kind.getElementType()) for x in value]
    if name == "DictType":
        return {k: _from_python(x, kind.getValueType()) for k, x in value.items()}
    if name == "TupleType":
        return tuple(_from_python(x, k) for x, k in zip(value, kind.elements(), strict=True))
    if name == "FloatType" and not isinstance(value, Tensor):
        return torch.sym_float(value)
    if name == "IntType" and isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return _NUMBERS[value]
    return value


@dataclass(frozen=True)
class _NumberTensor:
    """Stands for a tensor without dimensions whose number is known while tracing.

    Graphs of ``torch.jit.trace`` compute with sizes in tensors; as numbers, the sizes stay symbols.
    """

    value: Any

    def tensor(self) -> Tensor:
        is_float, is_bool = isinstance(self.value, (float, SymFloat)), isinstance(self.value, (bool, SymBool))
        dtype = torch.get_default_dtype() if is_float else torch.bool if is_bool else torch.int64
        return torch.scalar_tensor(self.value, dtype=dtype)


def _materialized(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.tensor() if isinstance(x, _NumberTensor) else x, tree)


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return value.value if isinstance(value, _NumberTensor) else value


class _GraphRun:
    """Runs one call of a graph.

    Attributes:
        where: the function or module that the graph belongs to.
        values: the values computed so far, by their names in the graph.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.values: dict[str, Any] = {}

    def block(self, block: Any) -> list[Any]:
        """Runs all nodes of a graph or block, and returns its outputs."""
        for node in block.nodes():
            try:
                result = self._evaluate(node, [self.values[v.debugName()] for v in node.inputs()])
            except (CaptureError, torch.jit.Error):
                raise
            except Exception as error:
                raise CaptureError(f"{self._place(node)}: {type(error).__name__}: {error}") from error
            # The result of a node without outputs is not used.
            results = [result] if node.outputsSize() == 1 else result
            self.values.update((v.debugName(), r) for v, r in zip(node.outputs(), results or (), strict=False))
        return [self.values[v.debugName()] for v in block.outputs()]

    def _evaluate(self, node: Any, inputs: list[Any]) -> Any:
        kind = node.kind()
        if kind in _NODES:
            return _NODES[kind](self, node, inputs)
        if kind in _ON_CONTAINERS and inputs and isinstance(inputs[0], (list, dict, str)):
            return _ON_CONTAINERS[kind](*inputs)
        if kind in _ON_NUMBERS and not any(isinstance(x, Tensor) for x in inputs):
            result = _ON_NUMBERS[kind](*map(_number, inputs))
            if node.output().type().kind() == "FloatType":
                result = torch.sym_float(result)
            return _NumberTensor(result) if any(isinstance(x, _NumberTensor) for x in inputs) else result
        inputs = _materialized(inputs)
        if kind in _ON_TENSORS:
            return _ON_TENSORS[kind](*inputs)
        return self.operator(node, inputs)

    def operator(self, node: Any, inputs: list[Any]) -> Any:
        """Calls an operator of the dispatcher, or one of TorchScript's own, which takes constant numbers only."""
        if node.schema() == "(no schema)":
            raise self.refusal(node)
        schema = torch._C.parse_schema(node.schema())
        leaves = pytree.tree_leaves(inputs)
        if torch._C._dispatch_has_kernel(f"{schema.name}.{schema.overload_name}".rstrip(".")):
            returned = {_element(r.real_type).kind() for r in schema.returns}
            if returned & {"IntType", "SymIntType"} and any(isinstance(x, Tensor) for x in leaves):
                raise self.refusal(node)
        elif schema.is_mutable or _is_symbolic(leaves) or any(isinstance(x, Tensor) for x in leaves):
            raise self.refusal(node)
        args, kwargs = [], {}
        for value, argument in zip(inputs, schema.arguments, strict=False):
            plain = _element(argument.real_type).kind() in ("IntType", "FloatType", "BoolType")
            if plain and _is_symbolic(value):
                raise self.refusal(node)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        namespace, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        return getattr(packet, schema.overload_name or "default")(*args, **kwargs)

    def refusal(self, node: Any) -> CaptureError:
        return CaptureError(
            f"{self._place(node)} cannot be interpreted with symbolic sizes. Build the model with the Python module or "
            "function in place of the TorchScript one (without torch.jit.script, torch.jit.trace or torch.jit.load)."
        )

    def _place(self, node: Any) -> str:
        line = re.search(r'File "(.*)", line (\d+)', node.sourceRange())
        source = f", {line[1]}:{line[2]}" if line else ""
        schema = "" if node.schema() == "(no schema)" else f" [{node.schema()}]"
        return f"the TorchScript node {node.kind()}{schema} ({self.where}{source})"


def _element(kind: Any) -> Any:
    """Returns the type inside optionals and lists."""
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return kind


def _is_symbolic(tree: Any) -> bool:
    return any(isinstance(x, (SymInt, SymFloat, SymBool)) for x in pytree.tree_leaves(tree))


def _outputs(node: Any, results: Sequence[Any]) -> Any:
    """Returns the result of a node: its one output, or the sequence of its outputs."""
    return results[0] if node.outputsSize() == 1 else results


def _constant(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    """Returns a constant. A loaded graph of ``torch.jit.trace`` has tensors where it computes with sizes."""
    value = node.output().toIValue()
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return _NumberTensor(value.item())
    return value


def _branch(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    chosen = list(node.blocks())[0 if inputs[0] else 1]
    return _outputs(node, run.block(chosen))


def _loop(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    limit, going, *carried = inputs
    (body,) = node.blocks()
    names = [v.debugName() for v in body.inputs()]
    step = 0
    while going and step < limit:
        run.values.update(zip(names, [step, *carried], strict=True))
        going, *carried = run.block(body)
        step += 1
    return _outputs(node, carried)


def _call_method(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    owner, *args = inputs
    return owner(*args) if node.s("name") == "forward" else getattr(owner, node.s("name"))(*args)


def _python_call(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    """Calls a function that the user exempted with ``torch.jit.ignore``; a method gets the interpreted module."""
    if list(node.scalar_args()):
        raise run.refusal(node)
    return getattr(node.pyobj(), "original_fn", node.pyobj())(*inputs)


def _tuple(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    text = node.output().type().str()
    if not text.startswith("NamedTuple("):
        return tuple(inputs)
    fields = text.removeprefix("NamedTuple")[1:-1]
    while "(" in fields:
        fields = re.sub(r"\([^()]*\)", "", fields)
    kind = namedtuple(str(node.output().type()).rpartition(".")[2], re.findall(r"(\w+) : ", fields))  # type: ignore[misc]
    return kind(*inputs)


def _raise(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    raise torch.jit.Error(inputs[0])


def _to(run: _GraphRun, node: Any, inputs: list[Any]) -> Any:
    """Calls ``to``, of which TorchScript has overloads of its own, with optional device and dtype."""
    value, *rest = _materialized(inputs)
    if "to.prim_Device" in node.schema():
        device, dtype, non_blocking, copy = rest
    elif "to.prim_dtype" in node.schema():
        device, (dtype, non_blocking, copy) = None, rest
    else:
        return run.operator(node, [value, *rest])
    return value.to(device=device, dtype=_DTYPES.get(dtype), non_blocking=non_blocking, copy=copy)


_NODES: dict[str, Callable[[_GraphRun, Any, list[Any]], Any]] = {
    "prim::Constant": _constant,
    "prim::If": _branch,
    "prim::Loop": _loop,
    "prim::CallMethod": _call_method,
    "prim::PythonOp": _python_call,
    "prim::GetAttr": lambda run, node, x: getattr(x[0], node.s("name")),
    "prim::SetAttr": lambda run, node, x: setattr(x[0], node.s("name"), x[1]),
    "prim::TupleConstruct": _tuple,
    "prim::ListConstruct": lambda run, node, x: x,
    "prim::DictConstruct": lambda run, node, x: dict(zip(x[::2], x[1::2], strict=True)),
    "prim::TupleUnpack": lambda run, node, x: _outputs(node, x[0]),
    "prim::ListUnpack": lambda run, node, x: _outputs(node, x[0]),
    "prim::TupleIndex": lambda run, node, x: x[0][x[1]],
    "prim::TupleSlice": lambda run, node, x: x[0][node.i("beg") : node.i("end")],
    "prim::RaiseException": _raise,
    "prim::Print": lambda run, node, x: print(*x),
    "prim::Uninitialized": lambda run, node, x: None,
    "prim::unchecked_cast": lambda run, node, x: x[0],
    "prim::unchecked_unwrap_optional": lambda run, node, x: x[0],
    "prim::NumToTensor": lambda run, node, x: _NumberTensor(x[0]),
    "aten::_unwrap_optional": lambda run, node, x: x[0],
    "aten::to": _to,
    "aten::warn": lambda run, node, x: warnings.warn(x[0], stacklevel=2),
    "aten::Int": lambda run, node, x: torch.sym_int(_number(x[0])),
    "aten::Float": lambda run, node, x: torch.sym_float(_number(x[0])),
    "aten::Bool": lambda run, node, x: bool(_number(x[0])),
    "aten::IntImplicit": lambda run, node, x: torch.sym_int(_number(x[0])),
    "aten::FloatImplicit": lambda run, node, x: torch.sym_float(_number(x[0])),
    "aten::ScalarImplicit": lambda run, node, x: _number(x[0]),
    "aten::item": lambda run, node, x: _number(x[0]),
    "aten::__is__": lambda run, node, x: x[0] is x[1],
    "aten::__isnot__": lambda run, node, x: x[0] is not x[1],
    "aten::__not__": lambda run, node, x: torch.sym_not(x[0]),
}
"""The nodes of the language, and conversions."""


def _add(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a + b if alpha == 1 else a + alpha * b


def _extremum(function: Callable[[Any, Any], Any], *values: Any) -> Any:
    return functools.reduce(function, values[0] if len(values) == 1 else values)


def _range_length(start: Any, stop: Any, step: Any) -> Any:
    return torch.sym_max((stop - start + step - (1 if step > 0 else -1)) // step, 0)


_ON_CONTAINERS: dict[str, Callable[..., Any]] = {
    "aten::len": len,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": operator.setitem,
    "aten::__contains__": operator.contains,
    "aten::Delete": operator.delitem,
    "aten::slice": lambda x, start, stop, step: x[start:stop:step],
    "aten::list": list,
    "aten::add_": operator.iadd,
    "aten::append": lambda x, item: x.append(item) or x,
    "aten::extend": lambda x, items: x.extend(items),
    "aten::pop": lambda x, *index: x.pop(*index),
    "aten::keys": list,
    "aten::values": lambda x: list(x.values()),
    "aten::items": lambda x: list(x.items()),
    "aten::sum": sum,
    "aten::format": lambda text, *values: text.format(*values),
    "prim::min": functools.partial(_extremum, torch.sym_min),
    "prim::max": functools.partial(_extremum, torch.sym_max),
}
"""The operators on lists, dicts and strings."""

_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "aten::add": _add,
    "aten::sub": lambda a, b, alpha=1: a - alpha * b,
    "aten::mul": operator.mul,
    "aten::div": operator.truediv,
    "aten::floordiv": operator.floordiv,
    "aten::floor_divide": operator.floordiv,
    "aten::remainder": operator.mod,
    "aten::pow": operator.pow,
    "aten::neg": operator.neg,
    "aten::floor": math.floor,
    "aten::ceil": math.ceil,
    "aten::sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__and__": operator.and_,
    "aten::__or__": operator.or_,
    "aten::__range_length": _range_length,
    "aten::__derive_index": lambda index, start, step: start + index * step,
    "aten::str": str,
    "prim::min": functools.partial(_extremum, torch.sym_min),
    "prim::max": functools.partial(_extremum, torch.sym_max),
    "prim::abs": abs,
}
"""Arithmetic with plain numbers; where an input is a tensor, the operator of the dispatcher is called instead."""


def _make_tensor(data: Any, dtype: int | None, device: Any, requires_grad: bool = False) -> Tensor:
    kind = None if dtype is None else _DTYPES[dtype]
    if not _is_symbolic(data):
        return torch.tensor(data, dtype=kind, device=device, requires_grad=requires_grad)
    if isinstance(data, list):
        return torch.stack([_make_tensor(x, dtype, device) for x in data])
    return _NumberTensor(data).tensor().to(dtype=kind, device=device)


_ON_TENSORS: dict[str, Callable[..., Any]] = {
    "aten::tensor": _make_tensor,
    "aten::as_tensor": lambda x, dtype, device: x.to(dtype=_DTYPES.get(dtype), device=device),
    "aten::size": lambda x, *dim: x.shape[dim[0]] if dim else list(x.shape),
    "aten::stride": lambda x, *dim: x.stride(*dim) if dim else list(x.stride()),
    "aten::len": lambda x: x.shape[0],
    "aten::numel": lambda x: x.numel(),
    "aten::dim": lambda x: x.dim(),
    "prim::device": lambda x: x.device,
    "prim::dtype": lambda x: _NUMBERS[x.dtype],
    "prim::layout": lambda x: _NUMBERS[x.layout],
    "prim::is_cuda": lambda x: x.is_cuda,
    "prim::requires_grad": lambda x: x.requires_grad,
    "prim::data": lambda x: x.detach(),
}
"""Operators from tensors to plain numbers, and from plain numbers to a tensor."""
