"""What experts cost is measured, and the same on all ranks."""

from __future__ import annotations

from typing import Any

import expert_workers as workers
import pytest
import torch
from pools import slow

from lightning_januspipe.expert_ranks.expert_costs import DECLARED, ExpertCosts, RowCost
from lightning_januspipe.runtime.expert_times import ExpertTimes, expert_costs
from lightning_januspipe.testing import RankPool

REPLICAS = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "expert_size": 2}


def test_seconds_are_counted_in_rows() -> None:
    times = ExpertTimes(row=1.0, message=7.0, expert=100.0, copy=11.0, num_weights=3, num_states=2)
    assert times.in_rows() == ExpertCosts(RowCost(7 * (1 + 3 * 3), 3 * 100), RowCost(7 * (1 + 2 * 3) + 2 * 11, 200))
    assert ExpertTimes(3.0, 1.0, 2.0, 0.0, 1, 0).in_rows() == ExpertCosts(RowCost(1, 1), RowCost(1, 2))


@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [
        (2, {"expert_placement": "load"}),
        slow(4, {"data_size": 4, "expert_placement": "replicate"}),
    ],
)
def test_all_ranks_have_the_times_of_the_slowest(pool: RankPool, num_ranks: int, more: dict[str, Any]) -> None:
    """They are known from the second step on, when Adam has two moments."""
    strategy = {**REPLICAS, **more}
    slow, *others = reversed(pool.run(workers.costs_of_steps, strategy, world_size=num_ranks))
    assert all(found == slow for found in others)
    first, second, third = slow
    assert set(first) == {DECLARED} and second == third
    # The last rank is the slowest: each of its measurements takes as many microseconds as there are ranks.
    message, rows = 1e-6 * num_ranks, 1e-6 * num_ranks / 4 / 192
    for num_weights, costs in zip((3, 2, 3, 2), second, strict=True):
        assert costs.move.once == pytest.approx(message * (1 + 3 * num_weights) / rows, abs=1)
        assert costs.guest.once == pytest.approx(message * (3 + 2 * num_weights) / rows, abs=1)
    # A message takes as long with the largest expert in it as without: a fourth of that is said to be for its bytes.
    largest = message / 4 / rows
    assert max(costs.move.each for costs in second) == pytest.approx(3 * largest, abs=1)
    assert max(costs.guest.each for costs in second) == pytest.approx(2 * largest, abs=1)


def test_costs_are_declared_where_torch_is_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert expert_costs([[torch.ones(2, 3, 3)]], [5], 2, None) == [DECLARED]  # type: ignore[arg-type]
    finally:
        torch.use_deterministic_algorithms(False)
