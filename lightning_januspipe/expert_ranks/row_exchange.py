"""Sends rows to the ranks that hold their experts, and back, with operations that can be differentiated repeatedly.

Both are permutations of the rows of all ranks, and so each is the other's transpose, and its derivative. With a raw
collective as derivative, energies and forces would be exact, and the gradient of a force loss silently wrong.

All ranks of a group have to call the same operations in the same order, ranks without rows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.graph.collectives import Exchanging, transposed
from lightning_januspipe.graph.exchange import send_rows_to_each

_WHAT = "exchange of rows between ranks with experts"


@dataclass(eq=False)
class RowExchange:
    """Says which rows of one micro-batch go where.

    Attributes:
        order: (R,) the rank's own rows in the order in which they are sent: by expert, and so by rank.
        send_counts: (X,) number of own rows for the experts of each rank.
        receive_counts: (X,) number of rows of each rank for this rank's experts.
        arrangement: (R',) the received rows in the order of this rank's experts.
        experts: (R',) the expert of each received row in that order; 0 is this rank's first expert.
        group: the ranks that share the experts; None for a single rank.
    """

    order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    arrangement: Tensor
    experts: Tensor
    group: dist.ProcessGroup | None = None

    def close(self) -> None:
        """Drops the reference to the group, so that its connections can be closed."""
        self.group = None


def bounds_of(num_experts: int, num_ranks: int) -> list[int]:
    """Returns the first expert of each rank, and at the end the number of experts: each rank has consecutive ones."""
    return [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]


def plan_rows(
    expert: Tensor, counts: Tensor, bounds: Sequence[int], rank: int, group: dist.ProcessGroup | None
) -> RowExchange:
    """Plans an exchange without communication.

    Args:
        expert: (R,) the expert of each own row.
        counts: (X, K) how many rows each rank has for each expert, on the host.
        bounds: first expert of each rank, see :func:`bounds_of`.
        rank: index of this rank.
        group: the ranks.
    """
    own = counts[:, bounds[rank] : bounds[rank + 1]]
    num_ranks, num_own = own.shape
    received = torch.arange(num_own).repeat(num_ranks).repeat_interleave(own.flatten())
    arrangement = received.argsort(stable=True)
    device = expert.device
    return RowExchange(
        order=expert.argsort(stable=True),
        send_counts=tuple(int(part.sum()) for part in counts[rank].tensor_split(list(bounds[1:-1]))),
        receive_counts=tuple(own.sum(1).tolist()),
        arrangement=arrangement.to(device),
        experts=received[arrangement].to(device),
        group=group,
    )


def send_rows(x: Tensor, exchange: RowExchange) -> Tensor:
    """Sends each row to the rank that holds its expert.

    Args:
        x: (R, ...) own rows.
        exchange: which rows go where.

    Returns:
        (R', ...) the rows of all ranks for this rank's experts, in the order of the experts. The derivative is
        :func:`return_rows`.
    """
    _check_rows(x, len(exchange.order))
    sent: Tensor = _SendRows.apply(x, exchange)
    return sent


def return_rows(y: Tensor, exchange: RowExchange) -> Tensor:
    """Sends each row back to the rank that it came from: the transpose of :func:`send_rows`.

    Args:
        y: (R', ...) rows of all ranks, as :func:`send_rows` returns them.
        exchange: which rows came from where.

    Returns:
        (R, ...) own rows.
    """
    _check_rows(y, len(exchange.arrangement))
    returned: Tensor = _ReturnRows.apply(y, exchange)
    return returned


def own_experts(exchange: RowExchange) -> Tensor:
    """Returns the expert of each row that :func:`send_rows` returns; 0 is this rank's first expert."""
    return exchange.experts


class _SendRows(Exchanging):
    @staticmethod
    def forward(x: Tensor, exchange: RowExchange) -> Tensor:
        received = x.new_empty(len(exchange.arrangement), *x.shape[1:])
        _exchange(received, x.index_select(0, exchange.order), exchange.receive_counts, exchange.send_counts, exchange)
        return received.index_select(0, exchange.arrangement)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(return_rows, ctx, gradients)


class _ReturnRows(Exchanging):
    @staticmethod
    def forward(y: Tensor, exchange: RowExchange) -> Tensor:
        returned = y.new_empty(len(exchange.order), *y.shape[1:])
        rows = y.new_empty(y.shape).index_copy_(0, exchange.arrangement, y)
        _exchange(returned, rows, exchange.send_counts, exchange.receive_counts, exchange)
        return returned.new_empty(returned.shape).index_copy_(0, exchange.order, returned)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return transposed(send_rows, ctx, gradients)


def _exchange(
    into: Tensor, rows: Tensor, receive_counts: Sequence[int], send_counts: Sequence[int], exchange: RowExchange
) -> None:
    if exchange.group is None:
        into.copy_(rows)
    else:
        send_rows_to_each(into, rows, receive_counts, send_counts, exchange.group, _WHAT)


def _check_rows(x: Tensor, expected: int) -> None:
    if x.dim() == 0 or x.shape[0] != expected:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} was given; expected {expected} rows on this rank")
