"""``wavek``: units of k micro-batches in alternating forward and backward waves that overlap at their boundaries.

A unit goes down and up in its forward wave (FE, FF), then down and up in its backward wave (BF, BE). The phases take
unequal times, so the wave of one unit alone leaves gaps; the wave of the next unit fills them (arXiv 2605.18404,
WaveK). Which phase should go first where two waves meet depends on the costs, so a portfolio of orders is scheduled
and the shortest is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, permutations, product

from lightning_januspipe.schedule.actions import Costs, Phase, Schedule
from lightning_januspipe.schedule.list_scheduler import (
    BREADTH_FIRST,
    DEPTH_FIRST,
    ListSchedule,
    Priority,
    list_schedule,
    lower_bound,
)
from lightning_januspipe.schedule.one_f_one_b import one_f_one_b
from lightning_januspipe.schedule.simulate import simulate

_OFTEN_BEST = (
    (Phase.FF, Phase.FE, Phase.BF, Phase.BE),
    (Phase.FF, Phase.FE, Phase.BE, Phase.BF),
    (Phase.BF, Phase.FF, Phase.FE, Phase.BE),
    (Phase.BF, Phase.FF, Phase.BE, Phase.FE),
)
_SEARCHED_ACTIONS = 400_000
_LEAST_TRIES = 48


@dataclass(frozen=True)
class WaveKChoice:
    """The order that `search_wavek` settled on.

    Args:
        schedule: The schedule.
        makespan: Its simulated makespan, without communication.
        wave_size: Micro-batches per unit; more than ``max_live`` means that the cap alone shapes the waves.
        max_live: The live cap that it was made under.
        phases: Phases from the most to the least urgent, where units overlap.
    """

    schedule: Schedule
    makespan: float
    wave_size: int
    max_live: int
    phases: tuple[Phase, ...]


def wavek(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    *,
    wave_size: int | str = "auto",
    max_live: int | None = None,
) -> Schedule:
    """Order the folded pipeline in waves of ``wave_size`` micro-batches; see `search_wavek`."""
    return search_wavek(num_ranks, num_microbatches, costs, wave_size=wave_size, max_live=max_live).schedule


def search_wavek(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    *,
    wave_size: int | str = "auto",
    max_live: int | None = None,
) -> WaveKChoice:
    """Search the waves with the least makespan; the same arguments give the same choice on every rank.

    With ``wave_size="auto"`` the result is never slower, without communication, than ``1f1b-fold`` under the same cap.

    Args:
        num_ranks: Number P of pipeline ranks, one stage on each.
        num_microbatches: Number M of micro-batches.
        costs: Measured phase times, the same on all ranks or one entry per rank.
        wave_size: Micro-batches per unit (k), or "auto" to search it as well.
        max_live: Most live micro-batches per rank. None stands for 2P, and for 2k where k is given and below P, as no
            more than two units overlap.
    """
    cap = max_live if max_live is not None else 2 * num_ranks
    if isinstance(wave_size, int) and max_live is None:
        cap = min(cap, 2 * wave_size)
    cap = min(cap, num_microbatches)
    best: WaveKChoice | None = None
    if wave_size == "auto":
        baseline = one_f_one_b(num_ranks, num_microbatches, costs, max_live=cap)
        schedule = Schedule("wavek", num_ranks, num_microbatches, baseline.actions)
        makespan = simulate(schedule, costs).makespan
        best = WaveKChoice(schedule, makespan, num_microbatches, min(cap, num_ranks), DEPTH_FIRST)
    optimum = lower_bound(costs, num_ranks, num_microbatches)
    num_tries = max(_LEAST_TRIES, _SEARCHED_ACTIONS // (4 * num_ranks * num_microbatches))
    for priority, live in islice(_portfolio(num_ranks, num_microbatches, wave_size, cap), num_tries):
        # A gain within rounding is no gain: the earlier entry of the portfolio stays.
        deadline = math.inf if best is None else best.makespan * (1.0 - 1e-9)
        if best is not None and deadline <= optimum:
            break
        found = list_schedule(num_ranks, num_microbatches, costs, priority, live, deadline=deadline)
        if found is not None:
            best = _choice(num_ranks, num_microbatches, found, priority, live)
    assert best is not None
    return best


def _choice(
    num_ranks: int, num_microbatches: int, found: ListSchedule, priority: Priority, max_live: int
) -> WaveKChoice:
    schedule = Schedule("wavek", num_ranks, num_microbatches, found.actions)
    return WaveKChoice(schedule, found.makespan, priority.unit, max_live, priority.phases)


def _portfolio(num_ranks: int, num_microbatches: int, wave_size: int | str, cap: int) -> Iterator[tuple[Priority, int]]:
    """Priorities and live caps to try, the most promising first."""
    orders = tuple(dict.fromkeys((*_OFTEN_BEST, DEPTH_FIRST, BREADTH_FIRST, *permutations(BREADTH_FIRST))))
    if isinstance(wave_size, int):
        wave_sizes = [min(wave_size, num_microbatches)]
    else:
        wished = (num_microbatches, num_ranks, 3 * num_ranks // 2, 2 * num_ranks, num_ranks // 2, 2, 1)
        wave_sizes = list(dict.fromkeys(size for size in wished if 1 <= size <= num_microbatches))
    # One unit of all micro-batches is best left to the cap; smaller ones gain from meeting their neighbours.
    shapes = [(size, size < num_microbatches) for size in wave_sizes]
    shapes += [(size, not overlap) for size, overlap in shapes]
    for live in dict.fromkeys(max(1, share) for share in (cap, 3 * cap // 4, cap // 2)):
        for (unit, overlap), order in product(shapes, orders):
            yield Priority(order, unit, overlap), live
