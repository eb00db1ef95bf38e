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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.distributed import waiting
from lightning_januspipe.graph.shards import Shard


@dataclass(eq=False)
class Exchange:
    """Holds the shard and the process group of an exchange.

    Attributes:
        shard: this rank's shard of the class whose rows are exchanged, on the device of the tensors.
        group: the ranks that share the rows, in order; None for a single rank.

    Raises:
        ValueError: the shard is not this rank's.
    """

    shard: Shard
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        size, rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        if (size, rank) != (self.shard.num_ranks, self.shard.rank):
            raise ValueError(
                f"the shard is of rank {self.shard.rank} of {self.shard.num_ranks}, but this is rank {rank} of {size} "
                "of the process group; expected the shard of this rank"
            )

    def close(self) -> None:
        """Drops the reference to the group: its connections close when no exchange in a graph refers to it any more."""
        self.group = None


def gather_halo(x: Tensor, exchange: Exchange) -> Tensor:
    """Appends the halo to the own rows, with one message to and from each neighbouring rank.

    Args:
        x: (n_own, ...) own rows.
        exchange: shard and group.

    Returns:
        (n_own + n_halo, ...); ``x`` itself if no rank has a halo. The derivative is :func:`sum_halo`.
    """
    _check_rows(x, exchange.shard.num_own)
    return x if exchange.shard.is_free else _GatherHalo.apply(x, exchange)


def sum_halo(y: Tensor, exchange: Exchange) -> Tensor:
    """Adds the rows in the halos of all ranks to their owners' rows: the transpose of :func:`gather_halo`.

    The order of summation is fixed, so that the result is the same in every run, on GPUs too.

    Args:
        y: (n_own + n_halo, ...) own rows, and summands for rows of other ranks.
        exchange: shard and group.

    Returns:
        (n_own, ...); ``y`` itself if no rank has a halo.
    """
    _check_rows(y, exchange.shard.num_own + exchange.shard.num_halo)
    return y if exchange.shard.is_free else _SumHalo.apply(y, exchange)


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
    _check_rows(y, exchange.shard.num_own + exchange.shard.num_halo)
    if exchange.shard.is_free:
        return y
    largest = _largest(y.detach(), exchange)
    is_largest = y.detach() == gather_halo(largest, exchange)
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
    return x if exchange.group is None else _SumOverRanks.apply(x, exchange)


def replicate(x: Tensor, exchange: Exchange) -> Tensor:
    """Marks where a replicated tensor, such as a feature of structures, is first used to compute own rows.

    Args:
        x: a tensor that is the same on all ranks.
        exchange: shard and group; only the group is used.

    Returns:
        ``x``. The derivative is :func:`sum_over_ranks`, the transpose (f in Megatron-LM).
    """
    return x if exchange.group is None else _Replicate.apply(x, exchange)


def count_once(x: Tensor, exchange: Exchange) -> Tensor:
    """Marks a parameter that a replicated computation reads: the ranks' parameter gradients are summed later.

    Args:
        x: a tensor that is the same on all ranks.
        exchange: shard and group; only rank and group are used.

    Returns:
        ``x``. Its gradient reaches the first rank only; the other ranks get zeros.
    """
    return x if exchange.group is None else _CountOnce.apply(x, exchange)


@torch.no_grad()
def collect_rows(x: Tensor, exchange: Exchange) -> Tensor:
    """Returns all rows in global order on every rank; it cannot be differentiated.

    Args:
        x: (n_own, ...) own rows.
        exchange: shard and group.

    Returns:
        (num_rows, ...), replicated.
    """
    shard = exchange.shard
    _check_rows(x, shard.num_own)
    if exchange.group is None:
        return x.detach()
    padded = x.new_zeros(max(shard.counts), *x.shape[1:])
    padded[: shard.num_own] = x
    rows = x.new_empty(shard.num_ranks, *padded.shape)
    if rows.numel():
        parts = list(_as_bytes(rows.flatten(0, 1)).chunk(shard.num_ranks))
        _call(dist.all_gather, exchange, parts, _as_bytes(padded))
    return torch.cat([r[:n] for r, n in zip(rows, shard.counts, strict=True)])[shard.order]


class _Exchanging(torch.autograd.Function):
    """Keeps the exchange for the derivative, and passes undefined gradients on."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Exchange], output: Tensor) -> None:
        ctx.exchange = inputs[1]
        ctx.set_materialize_grads(False)


def _transposed(
    function: Callable[[Tensor, Exchange], Tensor], ctx: Any, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, None]:
    """Returns the gradients of an exchange, computed with its transpose."""
    (given,) = gradients
    return None if given is None else function(given, ctx.exchange), None


class _GatherHalo(_Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        shard = exchange.shard
        extended = x.new_empty(shard.num_own + shard.num_halo, *x.shape[1:])
        extended[: shard.num_own] = x
        sent = x.index_select(0, shard.send)
        _all_to_all(extended[shard.num_own :], sent, shard.receive_counts, shard.send_counts, exchange)
        return extended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(sum_halo, ctx, gradients)


class _SumHalo(_Exchanging):
    @staticmethod
    def forward(y: Tensor, exchange: Exchange) -> Tensor:
        summed = y[: exchange.shard.num_own].clone(memory_format=torch.contiguous_format)
        # One call for each rank: no row occurs twice within a call, so that atomic additions cannot race.
        for rows, values in _returned(y, exchange):
            summed.index_add_(0, rows, values)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(gather_halo, ctx, gradients)


class _SumOverRanks(_Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        total = x.to(torch.float32 if is_half else x.dtype, copy=True, memory_format=torch.contiguous_format)
        if total.numel():
            _call(dist.all_reduce, exchange, torch.view_as_real(total) if total.is_complex() else total)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(replicate, ctx, gradients)


class _Replicate(_Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(sum_over_ranks, ctx, gradients)


class _CountOnce(_Exchanging):
    """Maps a parameter, whose cotangents are summed over the ranks, to a replicated tensor."""

    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(_OnFirstRank.apply, ctx, gradients)


class _OnFirstRank(_Exchanging):
    """Maps a replicated tensor to summands: itself on the first rank, zeros on the others. All ranks have this node."""

    @staticmethod
    def forward(x: Tensor, exchange: Exchange) -> Tensor:
        return x.view_as(x) if exchange.shard.rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return _transposed(count_once, ctx, gradients)


def _largest(y: Tensor, exchange: Exchange) -> Tensor:
    """Returns the values of :func:`max_halo`."""
    largest = y[: exchange.shard.num_own].clone(memory_format=torch.contiguous_format)
    for rows, values in _returned(y, exchange):
        largest[rows] = torch.maximum(largest[rows], values)
    return largest


def _returned(y: Tensor, exchange: Exchange) -> list[tuple[Tensor, Tensor]]:
    """Returns for each rank with own rows of this rank in its halo their local indices, and the values it holds."""
    shard = exchange.shard
    received = y.new_empty(sum(shard.send_counts), *y.shape[1:])
    _all_to_all(received, y[shard.num_own :], shard.send_counts, shard.receive_counts, exchange)
    parts = shard.send.split(shard.send_counts), received.split(shard.send_counts)
    return [(rows, values) for rows, values in zip(*parts, strict=True) if len(rows)]


def _all_to_all(
    into: Tensor, rows: Tensor, receive_counts: tuple[int, ...], send_counts: tuple[int, ...], exchange: Exchange
) -> None:
    """Sends rows to each rank, as bytes, which every backend can send."""
    if math.prod(rows.shape[1:]):  # the same on all ranks, unlike the number of rows
        sizes = list(receive_counts), list(send_counts)
        _call(dist.all_to_all_single, exchange, _as_bytes(into), _as_bytes(rows), *sizes)


def _call(collective: Callable[..., Any], exchange: Exchange, *args: Any) -> None:
    """Calls a collective over the group of an exchange.

    Raises:
        RankLostError: a rank did not answer.
    """
    with waiting("exchange of rows between graph ranks", exchange.group):
        collective(*args, group=exchange.group)


def _as_bytes(rows: Tensor) -> Tensor:
    """Returns (n, ...) as (n, bytes of one row); a view if the rows are contiguous."""
    rows = rows.detach().resolve_conj().resolve_neg().contiguous()
    width = math.prod(rows.shape[1:]) * rows.element_size()
    return rows.view(-1).view(torch.uint8).view(rows.shape[0], width)


def _check_rows(x: Tensor, expected: int) -> None:
    if x.dim() == 0 or x.shape[0] != expected:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} was given; expected {expected} rows on this rank")
