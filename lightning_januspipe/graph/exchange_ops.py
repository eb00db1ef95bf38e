"""The exchanges as operations of a captured program: rows along any dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_januspipe.graph import collectives
from lightning_januspipe.graph.collectives import Exchange


def gather_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Own rows along ``dim``, and then those of the halo; see :func:`~.collectives.gather_halo`."""
    return _along(collectives.gather_halo, x, exchange, dim)


def sum_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Own rows, with what all ranks' halos hold for them; see :func:`~.collectives.sum_halo`."""
    return _along(collectives.sum_halo, x, exchange, dim)


def max_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Own rows, each the largest of what all ranks' halos hold for it; see :func:`~.collectives.max_halo`."""
    return _along(collectives.max_halo, x, exchange, dim)


def with_low_room(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Own rows, and then rows of the lowest numbers for the halo: to find the largest in, before :func:`max_halo`."""
    num = exchange.shard.num_halo
    shape = [num if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat([x, x.new_full(shape, -math.inf)], dim)


def with_room(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Own rows, and then a zero row for each of the halo's: to sum into, before :func:`sum_halo`."""
    num = exchange.shard.num_halo
    shape = [num if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(shape)], dim)


def sum_over_ranks(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """See :func:`~.collectives.sum_over_ranks`."""
    return collectives.sum_over_ranks(x, exchange)


def replicate(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """See :func:`~.collectives.replicate`."""
    return collectives.replicate(x, exchange)


def count_once(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """See :func:`~.collectives.count_once`."""
    return collectives.count_once(x, exchange)


def _along(function: Callable[[Tensor, Exchange], Tensor], x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    if dim == 0:
        return function(x, exchange)
    return function(x.movedim(dim, 0), exchange).movedim(0, dim)
