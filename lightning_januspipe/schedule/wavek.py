"""Builds ``wavek`` and ``wavek-zb``: overlapping waves of k micro-batches.

A wave goes down and up the stages in its forward half (FE, FF), then down and up in its backward half (BF, BE). The
phases take unequal times, so one wave alone leaves gaps; the forward half of the next wave fills them (arXiv
2605.18404, WaveK). Which phase should go first where two waves meet depends on the costs, so many priorities are
scheduled and the shortest order is kept.

``wavek-zb`` goes beyond the paper in two ways. Weight gradients (WF, WE), which no other rank waits for, fill the gaps
that remain, as zero-bubble schedules do in first-order training. And a rank may have two stages, placed down the ranks
and up again, so that the first micro-batch reaches the last rank sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, permutations, product

from lightning_januspipe.schedule.actions import Phase, Schedule
from lightning_januspipe.schedule.bounds import lower_bound
from lightning_januspipe.schedule.list_scheduler import (
    BREADTH_FIRST,
    DEPTH_FIRST,
    PlacedStages,
    Priority,
    list_schedule,
)
from lightning_januspipe.schedule.one_f_one_b import one_f_one_b
from lightning_januspipe.schedule.request import Request
from lightning_januspipe.schedule.simulate import simulate

_OFTEN_BEST = (
    (Phase.FF, Phase.FE, Phase.BF, Phase.BE),
    (Phase.FF, Phase.FE, Phase.BE, Phase.BF),
    (Phase.BF, Phase.FF, Phase.FE, Phase.BE),
    (Phase.BF, Phase.FF, Phase.BE, Phase.FE),
)
# Each with the most weight gradients that a rank may put off: few of them serve a tight cap.
_OFTEN_BEST_DEFERRED = (
    ((Phase.FE, Phase.FF, Phase.BF, Phase.BE), None),
    ((Phase.BF, Phase.BE, Phase.FF, Phase.FE), 0),
    ((Phase.BF, Phase.FF, Phase.BE, Phase.FE), 1),
    ((Phase.FE, Phase.BF, Phase.FF, Phase.BE), None),
    ((Phase.FF, Phase.FE, Phase.BF, Phase.BE), 1),
    ((Phase.BF, Phase.BE, Phase.FE, Phase.FF), None),
    ((Phase.FF, Phase.BF, Phase.BE, Phase.FE), None),
    ((Phase.BE, Phase.BF, Phase.FE, Phase.FF), 2),
)
_CHUNKS = (2, 1)  # stages on a rank, in the order in which they are tried
# Bounds of the search: actions that are ordered for one cap, but at least and at most so many tries (if the least all
# exceed the memory limit, the cap is given up), and caps that are searched.
_SEARCHED_ACTIONS = 100_000
_LEAST_TRIES, _MOST_TRIES = 4, 400
_SEARCHED_CAPS = 3
_SMALL_CAP = 16  # up to which all lower caps are tried within a memory limit
# The search ends this near to the bound.
_GOOD_ENOUGH = 2e-3
# A gain within rounding is no gain: the earlier priority stays.
_ROUNDING = 1e-9
# More stages on a rank mean more messages; they have to shorten the step by this share.
_LEAST_GAIN_OF_CHUNKS = 5e-3


@dataclass(frozen=True)
class WaveKChoice:
    """Holds the order that `search_wavek` chose.

    Args:
        schedule: The chosen schedule.
        makespan: Its simulated makespan.
        bound: The time that no schedule of these stages can beat.
        wave_size: Micro-batches per wave; more than ``max_live`` means that the cap alone shapes the waves.
        max_live: The cap of live micro-batches that it was made under.
        phases: Phases from the most to the least urgent, where waves overlap.
    """

    schedule: Schedule
    makespan: float
    bound: float
    wave_size: int
    max_live: int
    phases: tuple[Phase, ...]


def wavek(request: Request) -> Schedule:
    """Orders the folded pipeline in waves, one stage on each rank; see `search_wavek`."""
    return search_wavek(request).schedule


def wavek_deferred(request: Request) -> Schedule:
    """Orders the folded pipeline in waves, with deferred weight gradients, and two stages on a rank where they help."""
    return search_wavek(request, deferred=True).schedule


def search_wavek(request: Request, *, deferred: bool = False) -> WaveKChoice:
    """Searches the waves with the least makespan; the same request gives the same choice on every rank.

    With ``wave_size="auto"`` the result of ``wavek`` is never slower than ``1f1b-fold`` under the same cap.
    ``max_live=None`` stands for 2P, and for k where ``wave_size`` k is given: a new wave starts as micro-batches of the
    wave before end, and waves may be smaller if that is faster. A memory limit may lower the cap further.

    Args:
        request: The arguments of `build_schedule`.
        deferred: Whether weight gradients are actions of their own, and a rank may have several stages.

    Raises:
        ValueError: Not even one micro-batch at a time keeps within the memory limit.
    """
    best: WaveKChoice | None = None
    least_bytes = math.inf
    placements = request.folded_layouts(_CHUNKS) if deferred else [tuple(range(request.num_ranks))]
    for placement in placements:
        stages = PlacedStages.folded(request.num_ranks, request.stage_costs(len(placement)), placement, request.latency)
        deadline = math.inf
        if best is not None:
            # More stages come first: fewer only have to be nearly as fast.
            fewer = len(placement) < best.schedule.num_stages
            deadline = best.makespan * (1 + _LEAST_GAIN_OF_CHUNKS if fewer else 1 - _ROUNDING)
        found, needed = _search_stages(request, stages, deferred, deadline)
        least_bytes = min(least_bytes, needed)
        best = found or best
    if best is None:
        raise ValueError(
            f"{request.limit_in_words}, but with one micro-batch at a time a rank already "
            f"holds {least_bytes:.4g} bytes of saved tensors: make micro-batches smaller (raise num_microbatches), use "
            "more stages, or raise the limit."
        )
    return best


def _search_stages(
    request: Request, stages: PlacedStages, deferred: bool, deadline: float
) -> tuple[WaveKChoice | None, float]:
    """Returns the best order of given stages that ends before the deadline, and the least memory that was seen."""
    num_microbatches, name = request.num_microbatches, "wavek-zb" if deferred else "wavek"
    num_stages = len(stages.placement)
    cap = min(_default_cap(request), num_microbatches)
    bound = lower_bound(stages.costs, stages.placement, num_microbatches, deferred=deferred, latency=request.latency)
    best: WaveKChoice | None = None
    least_bytes = math.inf
    if bound >= deadline:
        return None, least_bytes

    def consider(choice: WaveKChoice) -> bool:
        """Keeps a choice if it is the best so far; returns False if it needs too much memory."""
        nonlocal best, least_bytes
        if request.memory is not None and request.memory_limit is not None:
            report = simulate(choice.schedule, stages.costs, comm=request.latency, memory=request.memory)
            least_bytes = min(least_bytes, max(report.peak_memory))
            if not request.fits(max(report.peak_memory)):
                return False
        if best is None or choice.makespan < best.makespan * (1 - _ROUNDING):
            best = choice
        return True

    if request.wave_size == "auto" and not deferred:
        baseline = replace(one_f_one_b(replace(request, max_live=cap)), name=name)
        makespan = simulate(baseline, stages.costs, comm=request.latency).makespan
        live = min(cap, request.num_ranks)
        consider(WaveKChoice(baseline, makespan, bound, num_microbatches, live, DEPTH_FIRST))
    num_actions = (6 if deferred else 4) * num_stages * num_microbatches
    num_tries = min(max(_LEAST_TRIES, _SEARCHED_ACTIONS // num_actions), _MOST_TRIES)
    num_searched = 0
    for live in _caps(request, cap):
        num_over = 0
        for priority in islice(_portfolio(request, deferred), num_tries):
            if best is not None and best.makespan <= bound * (1 + _GOOD_ENOUGH):
                return best, least_bytes
            limit = deadline if best is None else best.makespan * (1 - _ROUNDING)
            found = list_schedule(stages, num_microbatches, priority, live, deferred=deferred, deadline=limit)
            if found is None:
                continue
            schedule = Schedule(name, request.num_ranks, num_microbatches, found.actions, stages.placement)
            choice = WaveKChoice(schedule, found.makespan, bound, priority.wave_size, live, priority.phases)
            num_over += not consider(choice)
            if num_over == _LEAST_TRIES:
                break
        num_searched += num_over < _LEAST_TRIES
        if num_searched == _SEARCHED_CAPS or (best is not None and num_actions * num_tries > _SEARCHED_ACTIONS):
            break
    return best, least_bytes


def _default_cap(request: Request) -> int:
    if request.max_live is not None:
        return request.max_live
    return 2 * request.num_ranks if request.wave_size == "auto" else request.wave_size


def _caps(request: Request, cap: int) -> list[int]:
    """Returns caps of live micro-batches to try: lower ones sometimes make a better order, and need less memory."""
    caps = [int(cap * share) for share in (1.0, 0.75, 0.5)]
    if request.memory_limit is not None:
        shares = (0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0)
        caps += range(cap, 0, -1) if cap <= _SMALL_CAP else [int(cap * share) for share in shares]
    return list(dict.fromkeys(max(1, live) for live in caps))


def _portfolio(request: Request, deferred: bool) -> Iterator[Priority]:
    """Yields the priorities to try, the most promising first."""
    num_ranks, num_microbatches = request.num_ranks, request.num_microbatches
    orders: list[tuple[tuple[Phase, ...], int | None]] = []
    if deferred:
        orders += _OFTEN_BEST_DEFERRED
    else:
        orders += ((order, None) for order in (*_OFTEN_BEST, DEPTH_FIRST))
    for most_deferred in (None, 0, 1) if deferred else (None,):
        orders += ((order, most_deferred) for order in permutations(BREADTH_FIRST))
    wished: list[int] = [] if request.wave_size == "auto" else [request.wave_size]
    wished += (num_microbatches, num_ranks, 3 * num_ranks // 2, 2 * num_ranks, num_ranks // 2, 2, 1)
    wave_sizes = list(dict.fromkeys(min(size, num_microbatches) for size in wished if size >= 1))
    # One wave of all micro-batches is best left to the cap; smaller ones gain from meeting their neighbours.
    shapes = [(size, size < num_microbatches) for size in wave_sizes]
    shapes += [(size, not overlap) for size, overlap in shapes]
    for (size, overlap), (order, most_deferred) in product(shapes, dict.fromkeys(orders)):
        yield Priority(order, size, overlap, most_deferred)
