"""Sends rows in half precision, with one scale for each type of atoms among the rows of a message.

Rows of one type are divided by a scale, so that the largest number among them is near the largest that float16 has. So
rounding is relative to the numbers of the type, however small they are beside those of other types. Both ends know the
types of all rows, and scales travel in front of the rows. (Janus, arXiv 2604.15821, sends rows of its experts in half
precision with a scale for each atom type; how is not published, so this is a choice of this package.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.distributed import waiting

ExchangeDtype = Literal["fp16", "bf16"]
"""What rows of exchanges may be rounded to."""

HALF: dict[ExchangeDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}

_LARGEST = 2.0**15
"""What the largest number of a type becomes; float16 has numbers to 65504."""

_SCALE = 4  # bytes


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Describes the rows of all messages that one rank sends, or receives.

    Attributes:
        counts: (X,) number of rows to, or from, each rank; rows of one rank stand together.
        scale: (R,) index of each row's scale.
        num_scales: (X,) number of types among the rows of each rank, each with a scale.
    """

    counts: tuple[int, ...]
    scale: Tensor
    num_scales: tuple[int, ...]

    @classmethod
    def of(cls, types: Tensor, counts: Sequence[int]) -> RowLayout:
        """Returns the layout of rows.

        Args:
            types: (R,) type of each row, any integers from 0.
            counts: (X,) see above.
        """
        ranks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(types.device)
        size = 1 + (int(types.max()) if len(types) else 0)
        pairs, scale = (ranks * size + types).unique(return_inverse=True)  # sorted: alike at both ends
        num = torch.bincount(pairs // size, minlength=len(counts)).tolist()
        return cls(tuple(counts), scale, tuple(num))

    def num_bytes(self, width: int, dtype: torch.dtype) -> list[int]:
        """Returns (X,) the bytes of each message with ``width`` numbers in a row."""
        row = width * dtype.itemsize
        return [_SCALE * n + row * count for n, count in zip(self.num_scales, self.counts, strict=True)]


@dataclass(frozen=True, eq=False)
class HalfRows:
    """Says how rows travel in half precision.

    Attributes:
        dtype: what rows are rounded to.
        send: the rows that this rank sends, in their order.
        receive: the rows of other ranks, in the order in which they arrive.
    """

    dtype: torch.dtype
    send: RowLayout
    receive: RowLayout

    @property
    def back(self) -> HalfRows:
        """Returns how the received rows travel back."""
        return HalfRows(self.dtype, self.receive, self.send)

    @staticmethod
    def fits(x: Tensor) -> bool:
        """Tells whether rows are real numbers of more than half precision."""
        return x.is_floating_point() and x.element_size() > 2


def send_half_rows(into: Tensor, rows: Tensor, half: HalfRows, group: dist.ProcessGroup | None, what: str) -> None:
    """Sends rows to each rank, rounded, with the scales of their types in front of them.

    Args:
        into: receives the rows of all ranks, those of the first rank first.
        rows: the rows to send, those for the first rank first; at least one number each.
        half: how they travel.
        group: the ranks.
        what: what is sent, as a noun.

    Raises:
        RankLostError: a rank did not answer.
    """
    send, receive, dtype = half.send, half.receive, half.dtype
    width = math.prod(rows.shape[1:])
    flat = rows.detach().reshape(len(rows), width)
    largest = flat.new_zeros(sum(send.num_scales)).scatter_reduce(0, send.scale, flat.abs().amax(1), "amax")
    scales = (largest / _LARGEST).float()
    scales = torch.where(scales == 0, 1.0, scales)
    rounded = (flat / scales.to(flat.dtype)[send.scale, None]).to(dtype)
    parts = zip(scales.split(send.num_scales), rounded.split(send.counts), strict=True)
    sent = torch.cat([part.contiguous().view(-1).view(torch.uint8) for pair in parts for part in pair])
    sizes = receive.num_bytes(width, dtype)
    received = sent.new_empty(sum(sizes))
    with waiting(what, group):
        dist.all_to_all_single(received, sent, sizes, send.num_bytes(width, dtype), group=group)
    messages = [
        message.split([_SCALE * num, len(message) - _SCALE * num])
        for message, num in zip(received.split(sizes), receive.num_scales, strict=True)
    ]
    given = torch.cat([scale for scale, _ in messages]).view(torch.float32)
    values = torch.cat([value for _, value in messages]).view(dtype).view(len(into), width)
    into.copy_((values.to(into.dtype) * given.to(into.dtype)[receive.scale, None]).view(into.shape))
