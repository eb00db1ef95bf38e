"""Builds ``1f1b-2nd`` and ``hanayo-2nd``, the baselines that do not fold: first-order pipelines of all forward phases.

To a first-order pipeline a training step has twice as many forward stages, FE of all layers and then FF of all layers,
and BF and BE are its backward pass. This sequence is cut into parts of equal cost, wherever the cuts fall. So FF of a
layer usually is on another rank than its FE: that rank holds the layer's weights once more, computes FE again (FF takes
``fe + ff`` and BF goes back through both, ``bf + be``), and adds its gradients. Where FE and FF of a layer meet on one
rank, nothing is computed twice.
"""

from __future__ import annotations

import math

from lightning_januspipe.schedule.actions import Phase, Schedule
from lightning_januspipe.schedule.costs import PhaseCosts, durations
from lightning_januspipe.schedule.list_scheduler import DEPTH_FIRST, PlacedStages, Priority, list_schedule
from lightning_januspipe.schedule.request import Request
from lightning_januspipe.schedule.stage_placement import cut_evenly, snake

_CHUNKS = (2, 3, 4)
"""Stages per rank that the potential may be cut into; parts of equal cost end where these stages do."""


def one_f_one_b_unfolded(request: Request) -> Schedule:
    """Orders P parts of all forward phases as 1F1B, with at most P live micro-batches."""
    return _fastest("1f1b-2nd", request, parts_per_rank=1, caps=(request.num_ranks,))


def hanayo_unfolded(request: Request) -> Schedule:
    """Orders 2P parts of all forward phases, down the ranks and up again, as one wave of Hanayo (SC '23).

    It has the number of live micro-batches, P to 2P, that makes it fastest.
    """
    num_ranks = request.num_ranks
    return _fastest("hanayo-2nd", request, parts_per_rank=2, caps=(2 * num_ranks, 3 * num_ranks // 2, num_ranks))


def _fastest(name: str, request: Request, parts_per_rank: int, caps: tuple[int, ...]) -> Schedule:
    """Returns the fastest schedule over the numbers of stages and the caps of live micro-batches that are allowed."""
    num_ranks, num_microbatches = request.num_ranks, request.num_microbatches
    priority = Priority(DEPTH_FIRST, wave_size=num_microbatches)
    if request.max_live is not None:
        caps = tuple(min(cap, request.max_live) for cap in caps)
    best: tuple[float, Schedule] | None = None
    for num_stages in request.stage_counts(_CHUNKS):
        costs = request.stage_costs(num_stages)
        stages = PlacedStages(
            num_ranks, costs, *unfolded_placement(costs, num_ranks, parts_per_rank), latency=request.latency
        )
        for cap in dict.fromkeys(caps):
            deadline = math.inf if best is None else best[0]
            found = list_schedule(stages, num_microbatches, priority, cap, deadline=deadline)
            if found is not None:
                schedule = Schedule(
                    name, num_ranks, num_microbatches, found.actions, stages.placement, stages.force_placement
                )
                best = found.makespan, schedule
    assert best is not None
    return best[1]


def unfolded_placement(
    costs: tuple[PhaseCosts, ...], num_ranks: int, parts_per_rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ranks of FE and BE, and of FF and BF, of each stage.

    Args:
        costs: Costs of each stage.
        num_ranks: Number of pipeline ranks.
        parts_per_rank: Parts of all forward phases on each rank, placed down the ranks and up again.
    """
    times = [durations(entry, deferred=False, split=True) for entry in costs]
    energies = [time[Phase.FE] + time[Phase.BE] for time in times]
    forces = [time[Phase.FF] + time[Phase.BF] for time in times]
    parts = cut_evenly([*energies, *reversed(forces)], num_ranks * parts_per_rank)
    ranks = snake(num_ranks, num_ranks * parts_per_rank)
    of_stages = [ranks[part] for part in parts]
    return tuple(of_stages[: len(costs)]), tuple(reversed(of_stages[len(costs) :]))
