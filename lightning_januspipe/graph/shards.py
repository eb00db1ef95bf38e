"""Records which rows of a class (atoms, edges, angles) each graph rank owns, and which rows of other ranks it reads.

Every rank knows the whole micro-batch and plans for all ranks, so that it knows the size of every message without
communication. On a rank, tensors of a class hold its own rows, (n_own, ...). Before a look-up that may read rows of
other ranks, copies of these rows are appended, the halo: (n_own + n_halo, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """Describes one class of rows as one rank holds it.

    Attributes:
        rank: the rank that holds it.
        num_rows: number of rows on all ranks.
        own: (n_own,) global indices of the own rows in local order, ascending.
        halo: (n_halo,) global indices of the other ranks' rows that this rank reads, grouped by owner, ascending.
        send: (n_send,) local indices of the own rows that other ranks read, grouped by receiver; in one group each row
            occurs once.
        send_counts: (G,) number of rows to send to each rank.
        receive_counts: (G,) number of halo rows from each rank.
        counts: (G,) number of own rows of each rank.
        halo_counts: (G,) number of halo rows of each rank.
        order: (num_rows,) indices such that ``cat(own rows of all ranks)[order]`` is in global order.
        is_free: whether no rank has a halo, so that nothing has to be exchanged.
    """

    rank: int
    num_rows: int
    own: Tensor
    halo: Tensor
    send: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    counts: tuple[int, ...]
    halo_counts: tuple[int, ...]
    order: Tensor
    is_free: bool

    @property
    def num_ranks(self) -> int:
        """Returns G, the number of ranks that share the rows."""
        return len(self.counts)

    @property
    def num_own(self) -> int:
        """Returns the number of own rows."""
        return self.counts[self.rank]

    @property
    def num_halo(self) -> int:
        """Returns the number of rows of other ranks that this rank reads."""
        return self.halo_counts[self.rank]

    @cached_property
    def local_indices(self) -> Tensor:
        """Returns the (num_rows,) local index of each row: own rows first, then the halo; -1 for other rows."""
        rows = self.own.new_full((self.num_rows,), -1)
        rows[self.own] = torch.arange(self.num_own, device=self.own.device)
        rows[self.halo] = torch.arange(self.num_own, self.num_own + self.num_halo, device=self.own.device)
        return rows

    def local(self, index: Tensor) -> Tensor:
        """Returns the local indices of rows.

        Args:
            index: global indices, of any shape.

        Raises:
            ValueError: a row is neither this rank's own nor in its halo.
        """
        found = self.local_indices[index]
        if (found < 0).any():
            missing = index[found < 0]
            raise ValueError(
                f"row {int(missing[0])} ({missing.numel()} rows in all) is neither rank {self.rank}'s own nor in its "
                "halo; expected rows that were passed to make_shards as needed"
            )
        return found

    def to(self, device: torch.device | str) -> Shard:
        """Returns the same shard with its tensors on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("own", "halo", "send", "order")}
        return replace(self, **tensors)


def whole(num_rows: int) -> Shard:
    """Returns the shard of a single rank, which holds all rows."""
    rows, none = torch.arange(num_rows), torch.empty(0, dtype=torch.int64)
    return Shard(0, num_rows, rows, none, none, (0,), (0,), (num_rows,), (0,), rows, True)


def make_shards(owner: Tensor, needed: Sequence[Tensor], num_ranks: int) -> list[Shard]:
    """Makes the shards of all ranks from the owners of the rows.

    Args:
        owner: (num_rows,) the rank that owns each row.
        needed: for each rank the global indices of the rows that it reads, in any order; own rows and repetitions are
            allowed. See :func:`rows_read`.
        num_ranks: G.

    Returns:
        The shards of all ranks, on the CPU.

    Raises:
        ValueError: an owner is not a rank, or there is not one entry of ``needed`` for each rank.
    """
    owner = owner.detach().to("cpu", torch.int64)
    num_rows = owner.numel()
    if num_rows and not 0 <= int(owner.min()) <= int(owner.max()) < num_ranks:
        raise ValueError(
            f"owners are {int(owner.min())} to {int(owner.max())}; expected ranks from 0 to {num_ranks - 1}"
        )
    if len(needed) != num_ranks:
        raise ValueError(f"needed has {len(needed)} entries; expected one for each of {num_ranks} ranks")
    by_owner = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=num_ranks).tolist()
    own = by_owner.split(counts)
    order = torch.empty_like(by_owner)
    order[by_owner] = torch.arange(num_rows)
    first = owner.new_tensor([0, *counts]).cumsum(0)

    halos, received = [], []
    for rank, rows in enumerate(needed):
        is_read = torch.zeros(num_rows, dtype=torch.bool)
        is_read[rows.detach().to("cpu", torch.int64)] = True
        is_read &= owner != rank
        halo = by_owner[is_read[by_owner]]
        halos.append(halo)
        received.append(torch.bincount(owner[halo], minlength=num_ranks).tolist())
    parts = [halo.split(numbers) for halo, numbers in zip(halos, received, strict=True)]
    is_free = not any(map(len, halos))
    return [
        Shard(
            rank=rank,
            num_rows=num_rows,
            own=own[rank],
            halo=halos[rank],
            send=order[torch.cat([parts[other][rank] for other in range(num_ranks)])] - first[rank],
            send_counts=tuple(received[other][rank] for other in range(num_ranks)),
            receive_counts=tuple(received[rank]),
            counts=tuple(counts),
            halo_counts=tuple(map(len, halos)),
            order=order,
            is_free=is_free,
        )
        for rank in range(num_ranks)
    ]


def rows_read(index: Tensor, reader: Tensor, num_rows: int, num_ranks: int) -> list[Tensor]:
    """Returns the rows that each rank reads by an index.

    Args:
        index: (R,) global index of the row that each of R readers reads: the sources of edges, say.
        reader: (R,) the rank that owns each reader: the owners of the edges, say.
        num_rows: number of rows of the class that is read.
        num_ranks: G.

    Returns:
        For each rank the rows that it reads, ascending, each once.
    """
    is_read = torch.zeros(num_ranks, num_rows, dtype=torch.bool)
    is_read.view(-1)[reader.detach().cpu() * num_rows + index.detach().cpu()] = True
    return [rows.nonzero().view(-1) for rows in is_read]
