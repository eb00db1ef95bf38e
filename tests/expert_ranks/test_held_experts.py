"""Rows of an expert are divided among the ranks that hold it, alike on all ranks."""

from __future__ import annotations

import pytest
import torch

from lightning_januspipe.expert_ranks import bounds_of
from lightning_januspipe.expert_ranks.expert_placement import Guest
from lightning_januspipe.expert_ranks.held_experts import HeldExperts

ORDER = [3, 0, 2, 1, 4]


@pytest.mark.parametrize(
    "guests", [[], [Guest(0, 1, 5)], [Guest(3, 2, 4), Guest(0, 2, 10), Guest(3, 1, 3), Guest(1, 0, 1)]]
)
def test_each_row_has_one_place(guests: list[Guest]) -> None:
    counts = torch.tensor([[4, 2, 0, 7, 1], [6, 0, 0, 1, 0], [0, 1, 3, 5, 0]])
    load = counts.sum(0).tolist()
    held = HeldExperts(ORDER, 3, load, guests)
    rows = held.rows(counts)
    slots = [
        expert
        for rank, (begin, end) in enumerate(zip(bounds_of(5, 3)[:-1], bounds_of(5, 3)[1:], strict=True))
        for expert in [*ORDER[begin:end], *held.guests[rank]]
    ]
    assert held.bounds[-1] == len(slots) == 5 + len(guests)
    for slot, expert in enumerate(slots):
        rank = next(r for r in range(3) if slot < held.bounds[r + 1])
        given = [r.rows for r in guests if r.expert == expert]
        mine = [r.rows for r in guests if r.expert == expert and r.rank == rank]
        assert rows[:, slot].sum() == (mine[0] if mine else load[expert] - sum(given))
    for rank, of_experts in enumerate(counts):
        expert = torch.arange(5).repeat_interleave(of_experts)
        expert = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(rank))]
        places = held.places(expert, rows[rank])
        assert torch.equal(torch.tensor(slots)[places], expert)
        assert torch.equal(torch.bincount(places, minlength=len(slots)), rows[rank])
