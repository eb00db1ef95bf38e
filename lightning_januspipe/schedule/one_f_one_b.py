"""``1f1b-fold``: the folded placement in 1F1B order, which is what the fold alone gives."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import Costs, PhaseCosts, Schedule, costs_per_rank
from lightning_januspipe.schedule.list_scheduler import DEPTH_FIRST, Priority, list_schedule

NOMINAL_COSTS = PhaseCosts(fe=1.0, ff=1.0, bf=2.0, be=2.0)
"""First-order rule of thumb: a backward phase takes twice the time of a forward phase."""


def one_f_one_b(num_ranks: int, num_microbatches: int, costs: Costs, *, max_live: int | None = None) -> Schedule:
    """Order the folded pipeline as 1F1B: backward before forward, at most P live micro-batches per rank.

    The order comes from nominal first-order costs, not from measured ones.

    Args:
        num_ranks: Number P of pipeline ranks, one stage on each.
        num_microbatches: Number of micro-batches.
        costs: Phase times; the order does not depend on them.
        max_live: A tighter cap than P on the live micro-batches per rank, or None.
    """
    costs_per_rank(costs, num_ranks)
    cap = num_ranks if max_live is None else min(num_ranks, max_live)
    priority = Priority(DEPTH_FIRST, unit=num_microbatches)
    found = list_schedule(num_ranks, num_microbatches, NOMINAL_COSTS, priority, cap)
    assert found is not None
    return Schedule("1f1b-fold", num_ranks, num_microbatches, found.actions)
