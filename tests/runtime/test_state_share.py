"""What each level of sharded state takes, against a count by hand."""

from __future__ import annotations

import pytest

from lightning_januspipe.runtime.state_share import state_share
from lightning_januspipe.schedule.state_actions import ShardLevel


@pytest.mark.parametrize(
    ("level", "in_phases", "between"),
    [
        ("none", 100 + 100 + 200, 100 + 100 + 200),
        ("optimizer", 100 + 100 + 50, 100 + 25 + 50),
        ("parameters", 100 + 25 + 100 + 50, 25 + 25 + 50),
    ],
)
def test_bytes_and_messages(level: ShardLevel, in_phases: float, between: float) -> None:
    share = state_share(level, 4, 100.0, 200.0)
    assert (share.in_phases, share.between) == (in_phases, between)
    assert (share.sent, share.num_messages) == (2 * 75, 6)
    accumulated = state_share(level, 4, 100.0, 200.0, accumulates=True)
    assert accumulated.in_phases == in_phases + (100 if level == "none" else 0)
    assert (accumulated.between, accumulated.in_reduction) == (share.between, share.in_reduction)


@pytest.mark.parametrize("level", ["none", "optimizer"])
def test_one_rank_shares_nothing(level: ShardLevel) -> None:
    share = state_share(level, 1, 100.0, 200.0)
    assert (share.in_phases, share.between, share.sent, share.num_messages) == (400, 400, 0, 0)
