"""The benchmark of placements trains on the same structures with each, and counts what is planned."""

from __future__ import annotations

import pytest

from lightning_januspipe.bench.expert_steps import PLACEMENTS, MixtureWork, expert_placements, trained_steps
from lightning_januspipe.testing import RankPool


def test_ranks_compute_the_same_rows_wherever_experts_are(pool: RankPool) -> None:
    work = MixtureWork(2, 2, num_features=8, num_experts=3, top_k=1, expert_features=8)
    in_order, with_guests = (pool.run(trained_steps, p, work, world_size=2) for p in ("order", "replicate"))
    for step in range(2):
        of_orders = [sum(rank.steps[step].rows for rank in ranks) for ranks in (in_order, with_guests)]
        assert of_orders[0] == of_orders[1] > 0
        assert all(0 < rank.steps[step].planning < rank.steps[step].busy for rank in with_guests)
    assert with_guests[0].costs == with_guests[1].costs and len(with_guests[0].costs) == 2


@pytest.mark.slow
def test_table() -> None:
    work = MixtureWork(1, 1, num_features=8, expert_features=8)
    header, _, *rows = expert_placements(work).partition("\n\n")[0].splitlines()
    assert "busiest process" in header
    found = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    assert found == [[str(ranks), words] for ranks in (2, 4) for words in PLACEMENTS.values()]
