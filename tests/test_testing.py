"""Pools of ranks: forked processes are as if they were started anew, and are replaced after a failure."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from pools import init_twice, pool_of, state

from lightning_januspipe.testing import RankError, RankPool


def test_several_process_groups_in_one_job(pool: RankPool) -> None:
    """What the first has left behind does not disturb the second."""
    assert pool.run(init_twice, world_size=2) == [2.0, 2.0]


def test_forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the environment and the start method of this process, and random numbers of their own."""
    monkeypatch.setenv("POOLS_TEST", "first")
    with pool_of(2) as ranks:
        before = ranks.run(os.getpid)
        assert ranks.run(os.getpid) == before
        found = ranks.run(state, "POOLS_TEST")
        assert [rank[:2] for rank in found] == [("first", multiprocessing.get_start_method())] * 2
        assert found[0][2] != found[1][2]

        with pytest.raises(RankError, match=r"(?s)rank 0: .*FileNotFoundError.*rank 1: "):
            ranks.run(os.stat, "/absent")
        monkeypatch.setenv("POOLS_TEST", "second")
        assert [value for value, *_ in ranks.run(state, "POOLS_TEST")] == ["second"] * 2
        assert not set(ranks.run(os.getpid)) & set(before)
