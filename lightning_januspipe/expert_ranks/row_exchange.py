"""Sends rows to the ranks that hold their experts, and back, with operations that can be differentiated repeatedly.

Both are permutations of the rows of all ranks, and so each is the other's transpose, and its derivative. With a raw
collective as derivative, energies and forces would be exact, and the gradient of a force loss silently wrong.

All ranks of a group have to call the same operations in the same order, ranks without rows too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.graph.collectives import Exchanging, transposed
from lightning_januspipe.graph.exchange import WithHandle, check_rows, send_rows_to_each
from lightning_januspipe.graph.half_rows import HalfRows, RowLayout

_WHAT = "exchange of rows between ranks with experts"


@dataclass(eq=False)
class RowExchange(WithHandle):
    """Says which rows of one micro-batch go where.

    Attributes:
        order: (R,) the rank's own rows in the order in which they are sent: by expert, and so by rank.
        send_counts: (X,) number of own rows for the experts of each rank.
        receive_counts: (X,) number of rows of each rank for this rank's experts.
        arrangement: (R',) the received rows in the order of this rank's experts.
        experts: (R',) the expert of each received row in that order; 0 is this rank's first expert.
        num_held: number of experts that this rank holds.
        group: the ranks that share the experts; None for a single rank.
        sizes_of_ranks: values of the size symbols of the micro-batch on all ranks that hold the stage, if these have
            told them each other.
        half: how rows travel in half precision; None for rows as they are.
    """

    order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    arrangement: Tensor
    experts: Tensor
    num_held: int
    group: dist.ProcessGroup | None = None
    sizes_of_ranks: Sequence[Mapping[str, int]] = field(default=(), repr=False)
    half: HalfRows | None = None

    @property
    def num_received(self) -> int:
        """Returns R', the number of rows of all ranks for this rank's experts."""
        return len(self.arrangement)

    def sent(self, x: Tensor) -> Tensor:
        """Returns (R', ...) the rows for this rank's experts; see :func:`send_rows`."""
        check_rows(x, len(self.order))
        received = x.new_empty(self.num_received, *x.shape[1:])
        rows = x.index_select(0, self.order)
        self._exchange(received, rows, self.receive_counts, self.send_counts, self.half)
        return received.index_select(0, self.arrangement)

    def returned(self, y: Tensor, num_rows: int) -> Tensor:
        """Returns (R, ...) own rows; see :func:`return_rows`."""
        check_rows(y, self.num_received)
        returned = y.new_empty(num_rows, *y.shape[1:])
        rows = y.new_empty(y.shape).index_copy_(0, self.arrangement, y)
        half = None if self.half is None else self.half.back
        self._exchange(returned, rows, self.send_counts, self.receive_counts, half)
        return returned.new_empty(returned.shape).index_copy_(0, self.order, returned)

    def _exchange(
        self,
        into: Tensor,
        rows: Tensor,
        receive_counts: Sequence[int],
        send_counts: Sequence[int],
        half: HalfRows | None = None,
    ) -> None:
        if self.group is None:
            into.copy_(rows)
        else:
            send_rows_to_each(into, rows, receive_counts, send_counts, self.group, _WHAT, half)

    def travel_as(self, dtype: torch.dtype, types: Tensor) -> None:
        """Lets rows travel in half precision from now on; all ranks of the group take part.

        Args:
            dtype: what rows are rounded to.
            types: (R,) type of each own row.
        """
        mine = types.index_select(0, self.order).to(torch.int32)[:, None]
        told = mine.new_empty(self.num_received, 1)
        self._exchange(told, mine, self.receive_counts, self.send_counts)
        send, receive = RowLayout.of(mine[:, 0], self.send_counts), RowLayout.of(told[:, 0], self.receive_counts)
        self.half = HalfRows(dtype, send, receive) if self.group is not None else None

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
        num_held=num_own,
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
    sent: Tensor = _SendRows.apply(x, exchange)
    return sent


def return_rows(y: Tensor, exchange: RowExchange, expert: Tensor) -> Tensor:
    """Sends each row back to the rank that it came from: the transpose of :func:`send_rows`.

    Args:
        y: (R', ...) rows of all ranks, as :func:`send_rows` returns them.
        exchange: which rows came from where.
        expert: (R, ...) any tensor with the own rows; their number counts only.

    Returns:
        (R, ...) own rows.
    """
    returned: Tensor = _ReturnRows.apply(y, exchange, expert.shape[0])
    return returned


class _SendRows(Exchanging):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        Exchanging.setup_context(ctx, inputs, output)
        ctx.num_rows = inputs[0].shape[0]

    @staticmethod
    def forward(x: Tensor, exchange: RowExchange) -> Tensor:
        return exchange.sent(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        (given,) = gradients
        return None if given is None else _ReturnRows.apply(given, ctx.exchange, ctx.num_rows), None


class _ReturnRows(Exchanging):
    @staticmethod
    def forward(y: Tensor, exchange: RowExchange, num_rows: int) -> Tensor:
        return exchange.returned(y, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        return *transposed(send_rows, ctx, gradients), None
