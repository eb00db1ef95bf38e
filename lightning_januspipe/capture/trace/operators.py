"""Holds, in one table, the facts about ATen operators by which the passes over a captured program decide.

Operators are named without their overload: ``"aten.index"`` stands for ``aten.index.Tensor``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.experts.grouped import grouped_linear

_OWN_OPERATIONS = (grouped_linear,)
"""Programs name operations; those of this package have to be registered on every rank that runs one."""


@dataclass(frozen=True)
class IndexArguments:
    """Holds the positions of an index operator's arguments.

    Attributes:
        rows: what is read from or written to.
        index: the indices: one tensor, or a list with a tensor or None for each dimension.
        dim: the dimension that the indices count along; None where ``index`` is a list.
    """

    rows: int
    index: int
    dim: int | None


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


_LIST, _ONE = IndexArguments(0, 1, None), IndexArguments(0, 2, 1)

GATHERS = {
    **dict.fromkeys(_aten("index _unsafe_index"), _LIST),
    **dict.fromkeys(_aten("index_select gather"), _ONE),
}
"""Operators that read rows by their indices."""

SCATTERS = {
    **dict.fromkeys(_aten("index_put"), _LIST),
    **dict.fromkeys(_aten("index_add index_reduce scatter scatter_add scatter_reduce"), _ONE),
}
"""Operators that write rows by their indices."""

LOOKUPS = GATHERS.keys() | _aten("embedding repeat_interleave select")
"""Operators whose result lacks a size of their operand because they look rows up, and not because they sum them."""

SUMS_INTO_ROWS = _aten("index_add scatter_add")
"""Scatters that always sum; ``index_put`` and ``scatter_reduce`` do if an argument says so."""

LINEAR = _aten("add sub rsub neg clone sum mean cat stack index index_select gather index_add scatter_add _to_copy")
"""Operators whose derivative depends on none of their operands."""

PRODUCTS = _aten("mul div linear mm bmm matmul addmm")
"""Operators that are linear in each operand but a divisor; a derivative depends on the other operands."""

BATCHED_PRODUCTS = _aten("bmm baddbmm matmul")
"""Matrix products whose operands share their first dimension."""

SUMS_ROWS = _aten("sum mm bmm matmul dot einsum mv tensordot")
"""Operators that sum over rows, and do nothing else with them."""

MIXES_ALONG_DIMS = _aten("cumsum cumprod flip roll sort argsort topk _softmax softmax _log_softmax log_softmax")
"""Operators along some dimensions that keep the dimensions' sizes."""

KEEPS_VALUES = _aten(
    "view reshape _unsafe_view unsqueeze squeeze expand expand_as clone _to_copy to contiguous detach alias flatten t "
    "transpose permute lift_fresh_copy type_as"
)
"""Operators whose result holds the values of their operand, in another shape or type."""

RESHAPES = _aten("view reshape _unsafe_view flatten")
"""Operators whose result holds the values of their operand, in the same order and another shape."""

REPEATS = _aten("expand expand_as repeat")
"""Operators that repeat their operand along a dimension."""

SHAPE_ONLY = _aten("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full")
"""Operators that read the shape and type of their operand, and none of its values."""

CREATES = SHAPE_ONLY | _aten("zeros ones empty full scalar_tensor")
"""Operators that make a tensor of one value."""

ONES = _aten("ones ones_like new_ones")
"""Operators that make a tensor of ones."""

ZEROS = _aten("zeros zeros_like new_zeros")
"""Operators that make a tensor of zeros."""

FILL_ARGUMENT = {"aten.full": 1, "aten.full_like": 1, "aten.new_full": 2}
"""Position of the value that an operator fills a tensor with."""

RANGES = _aten("slice narrow")
"""Operators that take a range along a dimension; its ends are sizes."""

SPLITS = _aten("split split_with_sizes chunk")
"""Operators that cut a tensor into ranges along a dimension."""


@lru_cache(maxsize=4096)
def _without_overload(target: str) -> str:
    return target.rpartition(".")[0]


def operator_of(node: Node) -> str:
    """Returns an operation's operator: ``"aten.index"``, say, or a Python function's name."""
    if isinstance(node.target, str):
        return _without_overload(node.target)
    return getattr(node.target, "__name__", "")


def target_function(target: Any) -> Callable[..., Any]:
    """Returns the callable behind a node's target."""
    if not isinstance(target, str):
        return target
    if target == "aten.copy.default":
        return _copy
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _copy(source: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten.copy`` has no derivative; this has."""
    return value.to(source.dtype).expand(source.shape)


def is_of_package(node: Node) -> bool:
    """Tells whether neither torch nor this project defines an operation, but a package that a model is made with."""
    return not node.is_placeholder and isinstance(node.target, str) and not node.target.startswith(_KNOWN)


_KNOWN = ("aten.", "januspipe.")


def is_view(node: Node) -> bool:
    """Tells whether an operation's value shares memory with an operand, or is one of several results."""
    return node.target is getitem or getattr(target_function(node.target), "is_view", False)


def is_pointwise(node: Node) -> bool:
    """Tells whether an operation computes each entry from the same entry of its operands, broadcast if need be."""
    return torch.Tag.pointwise in getattr(target_function(node.target), "tags", ())


def is_random(node: Node) -> bool:
    """Tells whether an operation draws random numbers."""
    if node.is_placeholder:
        return False
    return torch.Tag.nondeterministic_seeded in getattr(target_function(node.target), "tags", ())


def is_size(node: Node) -> bool:
    """Tells whether an operation gives a size, or computes with sizes, and no tensor."""
    if node.is_placeholder or node.spec is not None or node.target is getitem or is_of_package(node):
        return False
    operator = operator_of(node)
    return operator.startswith("aten.sym_") or not operator.startswith("aten.")


def index_arguments(node: Node) -> IndexArguments | None:
    """Returns where an index operation has its arguments; None for other operations."""
    operator = operator_of(node)
    return GATHERS.get(operator) or SCATTERS.get(operator)


def indices(node: Node) -> list[tuple[int, str]]:
    """Returns the dimensions and names of the indices of an index operation."""
    places = index_arguments(node)
    assert places is not None, f"{node.target} is no index operation"
    if places.dim is None:
        return [(d, i.name) for d, i in enumerate(node.args[places.index]) if isinstance(i, Ref)]
    return [(node.args[places.dim], node.args[places.index].name)]


def argument(node: Node, position: int, default: Any = None) -> Any:
    """Returns a positional argument, or its default where it was not given."""
    return node.args[position] if position < len(node.args) else default


def sums_into_rows(node: Node) -> bool:
    """Tells whether an operation that writes rows adds to what they hold."""
    operator = operator_of(node)
    if operator == "aten.index_put":
        return bool(argument(node, 3, False))
    if operator == "aten.scatter_reduce":
        return bool(node.args[4] == "sum")
    return operator in SUMS_INTO_ROWS


def keeps_largest(node: Node) -> bool:
    """Tells whether an operation that writes rows keeps the largest of floating-point values."""
    is_float = node.spec is not None and node.spec.dtype.is_floating_point
    return operator_of(node) == "aten.scatter_reduce" and node.args[4] == "amax" and is_float


def mixes_along(node: Node, dim: int) -> bool:
    """Tells whether an operation that keeps its operand's shape combines entries along a dimension."""
    if operator_of(node) not in MIXES_ALONG_DIMS:
        return False
    given = argument(node, 2 if operator_of(node) == "aten.roll" else 1)
    dims = [given] if isinstance(given, int) else given
    num = len(node.spec.shape) if node.spec is not None else 1
    return not isinstance(dims, (list, tuple)) or dim in [d % num for d in dims]


def is_zero(program: Program, name: str) -> bool:
    """Tells whether a value holds zeros only, by the operation that makes it."""
    node = program.by_name[name]
    operator = operator_of(node)
    if operator in FILL_ARGUMENT:
        return bool(node.args[FILL_ARGUMENT[operator]] == 0)
    if operator in KEEPS_VALUES and isinstance(node.args[0], Ref):
        return is_zero(program, node.args[0].name)
    return operator in ZEROS
