"""Bytes of state on each rank, as they are counted in training and as they are predicted."""

from __future__ import annotations

import pytest

from lightning_januspipe.bench.state_bytes import count_on_rank, state_bytes
from lightning_januspipe.runtime.state_share import LEVELS, state_share
from lightning_januspipe.schedule.state_actions import ShardLevel
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize(("level", "batches"), [*((level, 1) for level in LEVELS), ("none", 2), ("parameters", 2)])
def test_counts_are_those_of_the_table(pool: RankPool, level: ShardLevel, batches: int) -> None:
    found = pool.run(count_on_rank, level, 2, 1, 8, batches, world_size=2)
    whole = found[0]["parameters"]
    share = state_share(level, 2, whole, 2 * whole, accumulates=batches > 1)
    rest = 0.02 * whole  # shards have one length
    for of_rank in found:
        assert of_rank["in phases"] == pytest.approx(share.in_phases, abs=rest)
        assert of_rank["optimizer"] == pytest.approx(share.between, abs=rest)


@pytest.mark.slow
def test_table(pool: RankPool) -> None:
    header, _, *rows = state_bytes("1,2", num_layers=1, num_features=8, pool=pool).splitlines()
    assert "in phases, counted" in header
    assert [row.split("|")[1:3] for row in rows] == [
        *([" none ", " 1 "], [" none ", " 2 "], [" optimizer ", " 2 "], [" parameters ", " 2 "])
    ]
