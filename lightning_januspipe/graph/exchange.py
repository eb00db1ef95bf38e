"""Sends rows of one class between the graph ranks of a micro-batch; nothing here can be differentiated.

:mod:`~lightning_januspipe.graph.collectives` makes operations of these that can be.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.distributed import waiting
from lightning_januspipe.graph.half_rows import HalfRows, send_half_rows
from lightning_januspipe.graph.shards import Shard

_WHAT = "exchange of rows between graph ranks"

# Operators of compiled graphs take numbers and tensors only, so they look their exchange up, as torch's own
# collectives look up a process group by its name.
_BY_HANDLE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


class WithHandle:
    """Gives an exchange a number by which operators of compiled graphs find it, as long as it exists."""

    @cached_property
    def handle(self) -> int:
        """Returns the number."""
        handle = next(_HANDLES)
        _BY_HANDLE[handle] = self
        return handle


@dataclass(eq=False)
class Exchange(WithHandle):
    """Holds the shard and the process group of an exchange.

    Attributes:
        shard: this rank's shard of the class whose rows are exchanged, on the device of the tensors.
        group: the ranks that share the rows, in order; None for a single rank.
        half: how rows travel in half precision; None for rows as they are.

    Raises:
        ValueError: the shard is not this rank's.
    """

    shard: Shard
    group: dist.ProcessGroup | None = None
    half: HalfRows | None = None

    def __post_init__(self) -> None:
        size, rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        if (size, rank) != (self.shard.num_ranks, self.shard.rank):
            raise ValueError(
                f"the shard is of rank {self.shard.rank} of {self.shard.num_ranks}, but this is rank {rank} of {size} "
                "of the process group; expected the shard of this rank"
            )

    @property
    def is_free(self) -> bool:
        """Tells whether no rank has a halo, so that no rows have to be sent."""
        return self.shard.is_free

    @property
    def is_alone(self) -> bool:
        """Tells whether a single rank holds everything."""
        return self.group is None

    @property
    def num_halo(self) -> int:
        """Returns the number of rows of other ranks that this rank reads."""
        return self.shard.num_halo

    def close(self) -> None:
        """Drops the reference to the group: its connections close when no exchange in a graph refers to it any more."""
        self.group = None

    def check_own(self, x: Tensor) -> None:
        """Raises an error unless a tensor has the own rows."""
        check_rows(x, self.shard.num_own)

    def check_held(self, x: Tensor) -> None:
        """Raises an error unless a tensor has the own rows and those of the halo."""
        check_rows(x, self.shard.num_own + self.shard.num_halo)

    def gathered(self, x: Tensor, is_exact: bool = False) -> Tensor:
        """Returns the own rows, and then those of the halo, which their owners send.

        Args:
            x: own rows.
            is_exact: Whether rows travel as they are in any case.
        """
        shard = self.shard
        extended = x.new_empty(shard.num_own + shard.num_halo, *x.shape[1:])
        extended[: shard.num_own] = x
        if not shard.is_free:
            sent = x.index_select(0, shard.send)
            into, half = extended[shard.num_own :], None if is_exact else self.half
            send_rows_to_each(into, sent, shard.receive_counts, shard.send_counts, self.group, _WHAT, half)
        return extended

    def summed(self, y: Tensor) -> Tensor:
        """Returns the own rows, plus what all ranks hold for them in their halos."""
        summed = y[: self.shard.num_own].clone(memory_format=torch.contiguous_format)
        # One call for each rank: no row occurs twice within a call, so that atomic additions cannot race.
        for rows, values in self._returned(y):
            summed.index_add_(0, rows, values)
        return summed

    def largest(self, y: Tensor) -> Tensor:
        """Returns for each own row the largest entries that the owner and the halos of all ranks hold for it."""
        largest = y[: self.shard.num_own].clone(memory_format=torch.contiguous_format)
        for rows, values in self._returned(y, is_exact=True):
            largest[rows] = torch.maximum(largest[rows], values)
        return largest

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum over the ranks; half precision is summed in float32."""
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        total = x.to(torch.float32 if is_half else x.dtype, copy=True, memory_format=torch.contiguous_format)
        if total.numel() and not self.is_alone:
            self._call(dist.all_reduce, torch.view_as_real(total) if total.is_complex() else total)
        return total.to(x.dtype)

    def on_first_rank(self, x: Tensor) -> Tensor:
        """Returns the tensor itself on the first rank, and zeros on the others."""
        return x.view_as(x) if self.shard.rank == 0 else torch.zeros_like(x)

    def collected(self, x: Tensor) -> Tensor:
        """Returns the rows of all ranks in global order."""
        shard = self.shard
        if self.is_alone:
            return x.detach()
        padded = x.new_zeros(max(shard.counts), *x.shape[1:])
        padded[: shard.num_own] = x
        rows = x.new_empty(shard.num_ranks, *padded.shape)
        if rows.numel():
            parts = list(_as_bytes(rows.flatten(0, 1)).chunk(shard.num_ranks))
            self._call(dist.all_gather, parts, _as_bytes(padded))
        return torch.cat([r[:n] for r, n in zip(rows, shard.counts, strict=True)])[shard.order]

    def _returned(self, y: Tensor, is_exact: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Returns for each rank with own rows of this rank in its halo their local indices, and the values it holds."""
        shard = self.shard
        if shard.is_free:
            return []
        received = y.new_empty(sum(shard.send_counts), *y.shape[1:])
        half = None if is_exact or self.half is None else self.half.back
        rows = y[shard.num_own :]
        send_rows_to_each(received, rows, shard.send_counts, shard.receive_counts, self.group, _WHAT, half)
        parts = shard.send.split(shard.send_counts), received.split(shard.send_counts)
        return [(rows, values) for rows, values in zip(*parts, strict=True) if len(rows)]

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        """Calls a collective over the group.

        Raises:
            RankLostError: a rank did not answer.
        """
        with waiting(_WHAT, self.group):
            collective(*args, group=self.group)


def exchange_of(handle: int) -> Any:
    """Returns the exchange with a handle; the operator knows of which class it is."""
    found = _BY_HANDLE.get(handle)
    assert found is not None, f"the exchange {handle} is gone; something has to keep it until its micro-batch has ended"
    return found


def send_rows_to_each(
    into: Tensor,
    rows: Tensor,
    receive_counts: Sequence[int],
    send_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    what: str,
    half: HalfRows | None = None,
) -> None:
    """Sends rows to each rank, as bytes, which every backend can send.

    Args:
        into: receives the rows of all ranks, those of the first rank first.
        rows: the rows to send, those for the first rank first.
        receive_counts: the number of rows from each rank.
        send_counts: the number of rows to each rank.
        group: the ranks.
        what: what is sent, as a noun.
        half: how rows travel in half precision, if they are real numbers of more; None for rows as they are.

    Raises:
        RankLostError: a rank did not answer.
    """
    if not math.prod(rows.shape[1:]):  # on all ranks, unlike the number of rows
        return
    if half is not None and half.fits(rows):
        send_half_rows(into, rows, half, group, what)
    else:
        with waiting(what, group):
            sizes = list(receive_counts), list(send_counts)
            dist.all_to_all_single(_as_bytes(into), _as_bytes(rows), *sizes, group=group)


def _as_bytes(rows: Tensor) -> Tensor:
    """Returns (n, ...) as (n, bytes of one row); a view if the rows are contiguous."""
    rows = rows.detach().resolve_conj().resolve_neg().contiguous()
    width = math.prod(rows.shape[1:]) * rows.element_size()
    return rows.view(-1).view(torch.uint8).view(rows.shape[0], width)


def check_rows(x: Tensor, expected: int) -> None:
    """Raises an error unless a tensor has a number of rows.

    Raises:
        ValueError: It has another number.
    """
    if x.dim() == 0 or x.shape[0] != expected:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} was given; expected {expected} rows on this rank")
