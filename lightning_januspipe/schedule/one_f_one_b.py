"""Builds ``1f1b-fold``: the folded placement in 1F1B order, which shows what the fold alone gives."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import Schedule
from lightning_januspipe.schedule.costs import PhaseCosts
from lightning_januspipe.schedule.list_scheduler import DEPTH_FIRST, PlacedStages, Priority, list_schedule
from lightning_januspipe.schedule.request import Request

NOMINAL_COSTS = PhaseCosts(fe=1.0, ff=1.0, bf=2.0, be=2.0)
"""First-order rule of thumb: a backward phase takes twice the time of a forward phase."""


def one_f_one_b(request: Request) -> Schedule:
    """Orders the folded pipeline as 1F1B: backward before forward, at most P live micro-batches per rank.

    The order comes from nominal first-order costs, not from measured ones; ``max_live`` may be a tighter cap than P.
    """
    num_ranks, num_microbatches = request.num_ranks, request.num_microbatches
    cap = num_ranks if request.max_live is None else min(num_ranks, request.max_live)
    stages = PlacedStages.folded(num_ranks, (NOMINAL_COSTS,) * num_ranks, tuple(range(num_ranks)), 0.0)
    found = list_schedule(stages, num_microbatches, Priority(DEPTH_FIRST, wave_size=num_microbatches), cap)
    assert found is not None
    return Schedule("1f1b-fold", num_ranks, num_microbatches, found.actions)
