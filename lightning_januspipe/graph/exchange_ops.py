"""Makes the exchanges operations of a captured program, with rows along any dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_januspipe.graph import collectives
from lightning_januspipe.graph.exchange import Exchange


def gather_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Returns the own rows along ``dim``, and then those of the halo; see :func:`~.collectives.gather_halo`."""
    return _along(collectives.gather_halo, x, exchange, dim)


def sum_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Returns the own rows, plus what all ranks' halos hold for them; see :func:`~.collectives.sum_halo`."""
    return _along(collectives.sum_halo, x, exchange, dim)


def max_halo(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Returns for each own row the largest of what all ranks hold for it; see :func:`~.collectives.max_halo`."""
    return _along(collectives.max_halo, x, exchange, dim)


def with_low_room(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Returns the own rows, and then a row of -inf for each halo row, to keep the largest in for :func:`max_halo`."""
    num = exchange.num_halo
    shape = [num if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat([x, x.new_full(shape, -math.inf)], dim)


def with_room(x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    """Returns the own rows, and then a row of zeros for each halo row, to sum into for :func:`sum_halo`."""
    num = exchange.num_halo
    shape = [num if d == dim else size for d, size in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(shape)], dim)


def sum_over_ranks(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """Sums over the ranks; see :func:`~.collectives.sum_over_ranks`."""
    return collectives.sum_over_ranks(x, exchange)


def replicate(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """Marks the first use for own rows; see :func:`~.collectives.replicate`."""
    return collectives.replicate(x, exchange)


def count_once(x: Tensor, exchange: Exchange, _: int) -> Tensor:
    """Keeps the gradient on one rank; see :func:`~.collectives.count_once`."""
    return collectives.count_once(x, exchange)


def _along(function: Callable[[Tensor, Exchange], Tensor], x: Tensor, exchange: Exchange, dim: int) -> Tensor:
    if dim == 0:
        return function(x, exchange)
    return function(x.movedim(dim, 0), exchange).movedim(0, dim)
