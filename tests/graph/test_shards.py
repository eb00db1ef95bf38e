"""Shards: every row has one place, halos are what is read and not owned, and both sides of a message agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_januspipe.graph import Shard, make_shards, rows_read, whole


@st.composite
def divisions(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], int]:
    """Owners of rows, and what each rank reads; ranks and rows may be none."""
    num_ranks, num_rows = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    owner = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_rows, max_size=num_rows))
    rows = st.lists(st.integers(0, num_rows - 1), max_size=15) if num_rows else st.just([])
    needed = [torch.tensor(draw(rows), dtype=torch.int64) for _ in range(num_ranks)]
    return torch.tensor(owner, dtype=torch.int64), needed, num_ranks


def exchanged(shards: list[Shard], values: list[Tensor]) -> list[Tensor]:
    """What each rank receives, if each sends what its shard says."""
    parts = [v[s.send].split(s.send_counts) for s, v in zip(shards, values, strict=True)]
    return [torch.cat([parts[sender][s.rank] for sender in range(s.num_ranks)]) for s in shards]


@settings(deadline=None, max_examples=200)
@given(divisions())
def test_rows_are_sharded_and_exchanged(sharding: tuple[Tensor, list[Tensor], int]) -> None:
    owner, needed, num_ranks = sharding
    shards = make_shards(owner, needed, num_ranks)
    assert [s.rank for s in shards] == list(range(num_ranks))
    everywhere = torch.cat([s.own for s in shards])
    assert everywhere.sort().values.tolist() == list(range(len(owner)))
    assert everywhere[shards[0].order].tolist() == list(range(len(owner)))
    for shard, read in zip(shards, needed, strict=True):
        assert (owner[shard.own] == shard.rank).all() and shard.own.tolist() == sorted(shard.own.tolist())
        expected = sorted({(int(owner[row]), row) for row in read.tolist() if owner[row] != shard.rank})
        assert shard.halo.tolist() == [row for _, row in expected], "the halo is what is read and not owned, by owner"
        rows = torch.cat([shard.own, shard.halo])
        assert (shard.num_own, shard.num_halo) == (len(shard.own), len(shard.halo))
        assert shard.local(rows).tolist() == list(range(len(rows)))
        assert rows[shard.local(read)].tolist() == read.tolist()
        others = sorted(set(range(len(owner))) - set(rows.tolist()))
        assert (shard.local_indices[others] == -1).all()
        for missing in others[:1]:
            with pytest.raises(ValueError, match=f"row {missing} .* neither rank {shard.rank}"):
                shard.local(torch.tensor([missing]))
        assert shard.is_free == all(len(s.halo) == 0 for s in shards)
        for part in shard.send.split(shard.send_counts):
            assert len(part.unique()) == len(part), "a row would be added twice in one go"
    received = exchanged(shards, [s.own for s in shards])
    assert [r.tolist() for r in received] == [s.halo.tolist() for s in shards]


@settings(deadline=None, max_examples=100)
@given(divisions(), st.integers(0, 2**31))
def test_rows_that_are_read(sharding: tuple[Tensor, list[Tensor], int], seed: int) -> None:
    owner, _, num_ranks = sharding
    generator = torch.Generator().manual_seed(seed)
    num_readers = 20 if len(owner) else 0
    index = torch.randint(max(len(owner), 1), (num_readers,), generator=generator)
    reader = torch.randint(num_ranks, (num_readers,), generator=generator)
    found = rows_read(index, reader, len(owner), num_ranks)
    assert [f.tolist() for f in found] == [sorted(set(index[reader == r].tolist())) for r in range(num_ranks)]


def test_one_rank_has_everything() -> None:
    shard, (made,) = whole(5), make_shards(torch.zeros(5, dtype=torch.int64), [torch.tensor([3, 1, 3])], 1)
    for s in (shard, made):
        assert (
            s.is_free and s.num_own == 5 and s.num_halo == 0 and s.own.tolist() == s.order.tolist() == [0, 1, 2, 3, 4]
        )
        assert (
            s.counts == (5,) and s.send_counts == s.receive_counts == (0,) and s.local(s.own).tolist() == s.own.tolist()
        )


def test_moving_to_a_device_keeps_the_plan() -> None:
    shard = make_shards(torch.tensor([0, 1, 1]), [torch.tensor([2]), torch.tensor([1])], 2)[0]
    moved = shard.to("meta")
    assert {t.device.type for t in (moved.own, moved.halo, moved.send, moved.order)} == {"meta"}
    assert (moved.receive_counts, moved.send_counts, moved.is_free) == ((0, 1), (0, 0), False)


@pytest.mark.parametrize(
    ("owner", "num_needed", "message"),
    [
        ([0, 2], 2, "owners are 0 to 2; expected ranks from 0 to 1"),
        ([-1, 0], 2, "owners are -1"),
        ([0, 1], 1, "1 entr"),
    ],
)
def test_what_does_not_fit_is_refused(owner: list[int], num_needed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_shards(torch.tensor(owner), [torch.tensor([0])] * num_needed, 2)
