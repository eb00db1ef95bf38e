"""Multiplies each row by one of several matrices, in one operation that can be differentiated repeatedly.

Mixtures of experts multiply each row by the matrix of its expert, and models with a mixture of experts for each
structure the rows of each structure by a matrix of its own. In a loop over experts or structures, sizes depend on
values, and a trace would repeat the loop as often as its batch has them. :func:`grouped_linear` is one operation for
any number, and its rows may be sharded over graph ranks. Its derivatives are made of itself and of a sum of outer
products, whose derivatives are made of these two again, so that any order of derivatives exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """Multiplies each row by the matrix of its group.

    Args:
        x: (R, ..., I) rows.
        weight: (K, I, O) a matrix for each group, by which its rows are multiplied from the right: ``x @ weight[k]``.
            ``nn.Linear`` has its weight the other way round, (O, I); give ``linear.weight.T``.
        group: (R,) integers from 0 to K - 1, the group of each row; sorted ones are fastest.

    Under autocast rows of float32 are cast to its type, as for ``nn.Linear``, and matrices to the type of the rows.

    Returns:
        (R, ..., O); a group may have any number of rows, also none.

    Raises:
        ValueError: The shapes or types do not fit each other.
    """
    if x.dim() < 2 or weight.dim() != 3 or group.dim() != 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)}, group of shape {tuple(group.shape)}; "
            "expected (R, ..., I), (K, I, O) and (R,)"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype == torch.float32 else x
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; expected the same type for both outside autocast")
    result: Tensor = torch.ops.januspipe.grouped_linear(x, weight, group)
    return result


_GROUPED_MM: Any = getattr(torch.nn.functional, "grouped_mm", None)  # of newer versions of torch


def _fits_grouped_mm(*operands: Tensor) -> bool:
    """Returns whether torch's own product by groups takes operands.

    It is used where it was measured to be faster than a loop, and gave the same numbers: on the CPU, in single and half
    precision. It refuses float64, and strides that are not multiples of 16 bytes.
    """
    return _GROUPED_MM is not None and all(
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == operands[0].dtype
        and x.numel() > 0
        and (x.is_contiguous() or (x.dim() == 3 and x.mT.is_contiguous()))
        and all(size * x.element_size() % 16 == 0 for size in x.shape[1:])
        for x in operands
    )


@torch.library.custom_op("januspipe::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """Multiplies rows by the matrices of their groups, in the type of the rows."""
    order, counts = _groups(group, weight.shape[0])
    rows, weight = x if order is None else x.index_select(0, order), weight.to(x.dtype)
    if x.dim() == 2 and _fits_grouped_mm(rows, weight):
        products = _GROUPED_MM(rows, weight, offs=counts.cumsum(0, dtype=torch.int32))
    else:
        products = torch.cat([part @ matrix for part, matrix in zip(rows.split(counts.tolist()), weight, strict=True)])
    return _restored(products, order)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[2]])


@torch.library.custom_op("januspipe::grouped_outer", mutates_args=())
def _grouped_outer(a: Tensor, b: Tensor, group: Tensor, like: Tensor) -> Tensor:
    """Sums the outer products of the rows of each group, (R, ..., I) and (R, ..., O) to (K, I, O), in a type like."""
    order, counts = _groups(group, like.shape[0])
    a, b = (t if order is None else t.index_select(0, order) for t in (a, b))
    if a.dim() == 2 and _fits_grouped_mm(a, b):
        sums = _GROUPED_MM(a.T, b, offs=counts.cumsum(0, dtype=torch.int32))
    else:
        parts = zip(*(t.split(counts.tolist()) for t in (a, b)), strict=True)
        sums = torch.stack([x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1]) for x, y in parts])
    return sums.to(like.dtype)


@_grouped_outer.register_fake
def _(a: Tensor, b: Tensor, group: Tensor, like: Tensor) -> Tensor:
    return like.new_empty([like.shape[0], a.shape[-1], b.shape[-1]])


def _groups(group: Tensor, num: int) -> tuple[Tensor | None, Tensor]:
    """Returns an order with the rows of each group together (None for the given order), and their numbers."""
    counts = torch.bincount(group, minlength=num)
    if len(counts) > num:
        raise ValueError(f"a row is of group {len(counts) - 1}, but there are {num} matrices, from 0 to {num - 1}")
    is_sorted = bool((group[1:] >= group[:-1]).all())
    return (None if is_sorted else torch.argsort(group, stable=True)), counts


def _restored(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else torch.empty_like(rows).index_copy(0, order, rows)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, group = ctx.saved_tensors
    to_rows, to_weight = ctx.needs_input_grad[:2]
    return (
        _grouped_linear(gradient, weight.transpose(1, 2), group) if to_rows else None,
        torch.ops.januspipe.grouped_outer(x, gradient, group, weight) if to_weight else None,
        None,
    )


def _outer_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    a, b, group, _ = ctx.saved_tensors
    to_a, to_b = ctx.needs_input_grad[:2]
    return (
        _grouped_linear(b, gradient.transpose(1, 2), group) if to_a else None,
        _grouped_linear(a, gradient, group) if to_b else None,
        None,
        None,
    )


_BACKWARDS: list[tuple[Any, Callable[..., Any]]] = [
    (_grouped_linear, _linear_backward),
    (_grouped_outer, _outer_backward),
]
for _operation, _backward in _BACKWARDS:
    _operation.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.januspipe.grouped_linear)
def _flops_of_linear(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Tells torch's counter of operations what a product takes, of shapes (R, ..., I) and (K, I, O)."""
    return 2 * prod(x) * weight[2]


@register_flop_formula(torch.ops.januspipe.grouped_outer)
def _flops_of_outer(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Tells torch's counter of operations what sums of products take, of shapes (R, ..., I) and (R, ..., O)."""
    return 2 * prod(a) * b[-1]
