"""Multiplies the rows of each structure by a matrix of its own, in one operation that can be differentiated repeatedly.

Models with mixtures of linear experts multiply the rows of each structure by a matrix of its own, in a loop over
structures. A trace would repeat the loop as often as its batch has structures; :func:`segment_linear` is one operation
for any number of them, and its rows may be sharded over graph ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def segment_linear(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Multiplies each row by the matrix of its structure.

    Args:
        x: (R, ..., I) rows.
        weights: (B, O, I) a matrix for each structure.
        index: (R,) integers, the structure of each row; sorted ones are fastest.

    Returns:
        (R, ..., O)
    """
    result: Tensor = torch.ops.januspipe.segment_linear(x, weights, index)
    return result


@torch.library.custom_op("januspipe::segment_linear", mutates_args=())
def _segment_linear(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    order, parts = _segments(index, weights.shape[0])
    rows = x if order is None else x.index_select(0, order)
    products = [part @ weight.T for part, weight in zip(rows.split(parts), weights, strict=True)]
    return _restored(torch.cat(products), order)


@_segment_linear.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], weights.shape[1]])


@torch.library.custom_op("januspipe::segment_outer", mutates_args=())
def _segment_outer(a: Tensor, b: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Sums the outer products of the rows of each structure: (R, ..., O) and (R, ..., I) to (B, O, I)."""
    order, parts = _segments(index, like.shape[0])
    a, b = ((t if order is None else t.index_select(0, order)).split(parts) for t in (a, b))
    return torch.stack([x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1]) for x, y in zip(a, b, strict=True)])


@_segment_outer.register_fake
def _(a: Tensor, b: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return a.new_empty([like.shape[0], a.shape[-1], b.shape[-1]])


def _segments(index: Tensor, num: int) -> tuple[Tensor | None, list[int]]:
    """Returns an order with the rows of each structure together (None for the given order), and their numbers."""
    is_sorted = bool((index[1:] >= index[:-1]).all())
    counts: list[int] = torch.bincount(index, minlength=num).tolist()
    return (None if is_sorted else torch.argsort(index, stable=True)), counts


def _restored(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else torch.empty_like(rows).index_copy(0, order, rows)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weights, index = ctx.saved_tensors
    to_rows, to_weights = ctx.needs_input_grad[:2]
    return (
        segment_linear(gradient, weights.transpose(1, 2), index) if to_rows else None,
        torch.ops.januspipe.segment_outer(gradient, x, index, weights) if to_weights else None,
        None,
    )


def _outer_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    a, b, index, _ = ctx.saved_tensors
    to_a, to_b = ctx.needs_input_grad[:2]
    return (
        segment_linear(b, gradient, index) if to_a else None,
        segment_linear(a, gradient.transpose(1, 2), index) if to_b else None,
        None,
        None,
    )


_BACKWARDS: list[tuple[Any, Callable[..., Any]]] = [
    (_segment_linear, _linear_backward),
    (_segment_outer, _outer_backward),
]
for _operation, _backward in _BACKWARDS:
    _operation.register_autograd(_backward, setup_context=_keep)
