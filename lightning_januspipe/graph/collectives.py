"""Exchanges rows between graph ranks with operations that can be differentiated any number of times.

Each operation is a linear map over all ranks, and its derivative is the transposed map, which is again one of these
operations. With a raw collective as its derivative, energies and forces would be exact, and the gradient of a force
loss silently wrong.

A tensor has one of three placements. *Shard*: each rank holds its own rows. *Partial*: each rank holds a summand.
*Replicate*: each rank holds the same values, and computes the same with them. The cotangent of sharded rows is sharded.
The cotangent of a partial tensor is replicated. The cotangent of a replicated tensor that own rows are computed from is
partial.

All ranks of a group have to call the same operations in the same order, ranks with empty shards too. Undefined
gradients are passed on as autograd's own operations pass them on: the program decides which gradients are undefined, so
they are the same on all ranks. If they were made zeros, they would cost messages, and a backward pass that stops at
some nodes would run on behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.graph.exchange import Exchange


def gather_halo(x: Tensor, exchange: Exchange) -> Tensor:
    """Appends the halo to the own rows, with one message to and from each neighbouring rank.

    Args:
        x: (n_own, ...) own rows.
        exchange: shard and group.

    Returns:
        (n_own + n_halo, ...); ``x`` itself if no rank has a halo. The derivative is :func:`sum_halo`.
    """
    exchange.check_own(x)
    return x if exchange.is_free else _GatherHalo.apply(x, exchange)


def sum_halo(y: Tensor, exchange: Exchange) -> Tensor:
    """Adds the rows in the halos of all ranks to their owners' rows: the transpose of :func:`gather_halo`.

    The order of summation is fixed, so that the result is the same in every run, on GPUs too.

    Args:
        y: (n_own + n_halo, ...) own rows, and summands for rows of other ranks.
        exchange: shard and group.

    Returns:
        (n_own, ...); ``y`` itself if no rank has a halo.
    """
    exchange.check_held(y)
    return y if exchange.is_free else _SumHalo.apply(y, exchange)


def max_halo(y: Tensor, exchange: Exchange) -> Tensor:
    """Returns for each own row the largest entries that the owner and the halos of all ranks hold for it.

    All equally large entries share the gradient, as with torch's ``scatter_reduce``. It is computed with sums over
    halos, and so can be differentiated again.

    Args:
        y: (n_own + n_halo, ...) own rows, and candidates for rows of other ranks.
        exchange: shard and group.

    Returns:
        (n_own, ...); ``y`` itself if no rank has a halo.
    """
    exchange.check_held(y)
    if exchange.is_free:
        return y
    largest = exchange.largest(y.detach())
    is_largest = y.detach() == exchange.gathered(largest, is_exact=True)
    num = sum_halo(is_largest.to(y.dtype), exchange)
    return sum_halo(torch.where(is_largest, y, torch.zeros_like(y)), exchange) / num


def sum_over_ranks(x: Tensor, exchange: Exchange) -> Tensor:
    """Sums a partial tensor over the ranks; half precision is summed in float32.

    Args:
        x: the summand of this rank, of the same shape on all ranks.
        exchange: shard and group; only the group is used.

    Returns:
        The sum, replicated. The derivative is :func:`replicate`: every rank already has the whole cotangent, and
        summing it once more would count it G times (g in Megatron-LM, arXiv 1909.08053, section 3).
    """
    return x if exchange.is_alone else _SumOverRanks.apply(x, exchange)


def replicate(x: Tensor, exchange: Exchange) -> Tensor:
    """Marks where a replicated tensor, such as a feature of structures, is first used to compute own rows.

    Args:
        x: a tensor that is the same on all ranks.
        exchange: shard and group; only the group is used.

    Returns:
        ``x``. The derivative is :func:`sum_over_ranks`, the transpose (f in Megatron-LM).
    """
    return x if exchange.is_alone else _Replicate.apply(x, exchange)


def count_once(x: Tensor, exchange: Exchange) -> Tensor:
    """Marks a parameter that a replicated computation reads: the ranks' parameter gradients are summed later.

    Args:
        x: a tensor that is the same on all ranks.
        exchange: shard and group; only rank and group are used.

    Returns:
        ``x``. Its gradient reaches the first rank only; the other ranks get zeros.
    """
    return x if exchange.is_alone else _CountOnce.apply(x, exchange)


@torch.no_grad()
def collect_rows(x: Tensor, exchange: Exchange) -> Tensor:
    """Returns all rows in global order on every rank; it cannot be differentiated.

    Args:
        x: (n_own, ...) own rows.
        exchange: shard and group.

    Returns:
        (num_rows, ...), replicated.
    """
    exchange.check_own(x)
    return exchange.collected(x)


class Exchanging(torch.autograd.Function):
    """Keeps the exchange for the derivative, and passes undefined gradients on."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        """Keeps the exchange."""
        ctx.exchange = inputs[1]
        ctx.set_materialize_grads(False)


def transposed(
    function: Callable[[Tensor, Any], Tensor], ctx: Any, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, None]:
    """Returns the gradients of an exchange, computed with its transpose."""
    (given,) = gradients
    return None if given is None else function(given, ctx.exchange), None


class _GatherHalo(Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return exchange.gathered(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(sum_halo, ctx, gradients)


class _SumHalo(Exchanging):
    @staticmethod
    def forward(y: Tensor, exchange: Exchange) -> Tensor:
        return exchange.summed(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(gather_halo, ctx, gradients)


class _SumOverRanks(Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return exchange.total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(replicate, ctx, gradients)


class _Replicate(Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(sum_over_ranks, ctx, gradients)


class _CountOnce(Exchanging):
    """Maps a parameter, whose cotangents are summed over the ranks, to a replicated tensor."""

    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(_OnFirstRank.apply, ctx, gradients)


class _OnFirstRank(Exchanging):
    """Maps a replicated tensor to summands: itself on the first rank, zeros on the others. All ranks have this node."""

    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return exchange.on_first_rank(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(count_once, ctx, gradients)
