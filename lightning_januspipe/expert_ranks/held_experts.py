"""Divides the rows of experts among the ranks that hold them during a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_januspipe.expert_ranks.expert_placement import Guest
from lightning_januspipe.expert_ranks.row_exchange import bounds_of


class HeldExperts:
    """Says which experts of a mixture each rank holds during a step, and which rows it computes.

    An expert on a rank is a slot. A rank's slots are its own experts, in their order, and then its guests, other ranks'
    experts, in the order in which these hold them. The rows of an expert are numbered over all ranks, and each slot
    gets consecutive ones.

    Args:
        order: (K,) experts in the order in which ranks hold their own ones.
        num_ranks: X.
        load: (K,) rows of each expert in the step; read where there are guests only.
        guests: the experts that ranks hold beside their own ones.

    Attributes:
        guests: for each rank, these experts.
        bounds: the first slot of each rank, and at the end S, the number of slots.
    """

    def __init__(
        self, order: Sequence[int], num_ranks: int, load: Sequence[int] = (), guests: Sequence[Guest] = ()
    ) -> None:
        bounds, place = bounds_of(len(order), num_ranks), {expert: i for i, expert in enumerate(order)}
        left = {r.expert: load[r.expert] for r in guests}  # rows that the owners of guests keep
        for guest in guests:
            left[guest.expert] -= guest.rows
        experts: list[int] = []
        shares: list[int] = []
        self.guests: list[list[int]] = []
        self.bounds = [0]
        for rank in range(num_ranks):
            own = list(order[bounds[rank] : bounds[rank + 1]])
            given = sorted((r for r in guests if r.rank == rank), key=lambda r: place[r.expert])
            self.guests.append([r.expert for r in given])
            experts += own + self.guests[-1]
            shares += [left.get(expert, 1) for expert in own] + [r.rows for r in given]
            self.bounds.append(len(experts))
        self._experts = torch.tensor(experts)
        self._by_expert = self._experts.argsort(stable=True)
        ends, all_shares = [0] * len(experts), [0] * len(order)
        for slot in self._by_expert.tolist():
            all_shares[experts[slot]] += shares[slot]
            ends[slot] = all_shares[experts[slot]]
        upper = torch.tensor(ends)
        self._parts = upper - torch.tensor(shares), upper, torch.tensor(all_shares)[self._experts]

    def rows(self, counts: Tensor) -> Tensor:
        """Returns (X, S) how many rows each rank has for each slot.

        Args:
            counts: (X, K) how many rows each rank has for each expert, on the host.
        """
        end = counts.cumsum(0)
        before, after = (end - counts)[:, self._experts], end[:, self._experts]
        lower, upper, share = self._parts
        all_rows = end[-1, self._experts]
        first, last = all_rows * lower // share, all_rows * upper // share
        return (torch.minimum(after, last) - torch.maximum(before, first)).clamp(min=0)

    def places(self, expert: Tensor, rows: Tensor) -> Tensor:
        """Returns (R,) the slot of each own row.

        Args:
            expert: (R,) its expert.
            rows: (S,) how many own rows go to each slot.
        """
        slots = self._by_expert.repeat_interleave(rows[self._by_expert])
        return torch.empty_like(expert).index_copy_(0, expert.argsort(stable=True), slots.to(expert))
