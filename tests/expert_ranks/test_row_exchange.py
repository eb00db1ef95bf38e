"""Rows that travel to the ranks of their experts give the derivatives, of any order, that they give in one process."""

from __future__ import annotations

from itertools import pairwise

import expert_workers as workers
import pytest
import torch

from lightning_januspipe.expert_ranks import bounds_of, plan_rows, return_rows, send_rows
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize("sizes", [[4, 7], [0, 5], [3, 0, 6]])
def test_derivatives_of_a_loss_on_derivatives(pool: RankPool, sizes: list[int]) -> None:
    for result in pool.run(workers.force_loss, sizes, world_size=len(sizes)):
        for found, expected in zip(result["found"], result["expected"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_rank_sorts_and_restores() -> None:
    expert = torch.tensor([2, 0, 2, 1])
    exchange = plan_rows(expert, torch.bincount(expert, minlength=4)[None], bounds_of(4, 1), 0, None)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert exchange.experts.tolist() == [0, 1, 2, 2] and exchange.send_counts == exchange.receive_counts == (4,)
    torch.testing.assert_close(send_rows(x, exchange), x[torch.tensor([1, 3, 0, 2])])
    torch.testing.assert_close(return_rows(send_rows(x, exchange), exchange, expert), x)
    assert torch.autograd.gradgradcheck(lambda rows: send_rows(rows**3, exchange), (x,))
    with pytest.raises(ValueError, match="expected 4 rows on this rank"):
        send_rows(x[:2], exchange)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (5, 2), (7, 3), (3, 3)])
def test_each_expert_has_one_rank(num_experts: int, num_ranks: int) -> None:
    bounds = bounds_of(num_experts, num_ranks)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == num_experts and max(sizes) - min(sizes) <= 1 <= min(sizes)
