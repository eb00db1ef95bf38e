"""Times a schedule: when each action starts and ends, how long the step takes, and how many micro-batches are live."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_januspipe.schedule.actions import (
    DEFERRED_PHASES,
    Action,
    Costs,
    Phase,
    PhaseCosts,
    Schedule,
    costs_per_rank,
    dependencies,
)
from lightning_januspipe.schedule.validate import validate


@dataclass(frozen=True)
class Report:
    """Timing of one simulated step, in the unit of time of the costs.

    Args:
        makespan: Time from the first start to the last end.
        ideal: Time that the busiest rank works, M·T; no schedule is faster.
        peak_live: Per rank, the most micro-batches that are at once between the start of their FE and the end of
            their BE.
        start: Start time of every action.
        end: End time of every action.
    """

    makespan: float
    ideal: float
    peak_live: tuple[int, ...]
    start: Mapping[Action, float]
    end: Mapping[Action, float]

    @property
    def bubble_fraction(self) -> float:
        """Share of the makespan in which the busiest rank waits, from 0 to 1."""
        return max(0.0, 1.0 - self.ideal / self.makespan)


def simulate(schedule: Schedule, costs: Costs, *, comm: float = 0.0) -> Report:
    """Run a schedule in simulated time.

    Every action starts as soon as its rank has ended the one before and its dependencies are met. Messages travel
    beside the computation and arrive ``comm`` after the sending action ends. WF and WE, where the schedule lacks them,
    are spent inside BF and BE. A rank with several stages spends an equal share of its costs on each.

    Args:
        schedule: The schedule to time.
        costs: Phase times, the same on all ranks or one entry per rank.
        comm: Latency of a message between two ranks, in the unit of time of the costs.

    Raises:
        ScheduleError: If the schedule cannot run to its end.
        ValueError: If ``comm`` is negative or not finite, or ``costs`` does not fit the number of ranks.
    """
    if not (math.isfinite(comm) and comm >= 0):
        raise ValueError(f"comm is {comm!r}, expected a finite latency >= 0.")
    per_rank = costs_per_rank(costs, schedule.num_ranks)
    stages_per_rank = Counter(schedule.placement)
    phases = schedule.phases
    duration = [_durations(entry, phases, max(1, stages_per_rank[rank])) for rank, entry in enumerate(per_rank)]
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    clock = [0.0] * schedule.num_ranks
    position = [0] * schedule.num_ranks
    waiting: dict[Action, list[int]] = {}
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        order = schedule.actions[rank]
        while position[rank] < len(order):
            action = order[position[rank]]
            ready = clock[rank]
            # The first dependency implies the others: all lie before it on the micro-batch's chain.
            needed = next(iter(dependencies(action, schedule.num_stages)), None)
            if needed is not None:
                if needed not in end:
                    waiting.setdefault(needed, []).append(rank)
                    break
                latency = comm if schedule.rank_of(needed) != rank else 0.0
                ready = max(ready, end[needed] + latency)
            start[action] = ready
            end[action] = clock[rank] = ready + duration[rank][action.phase]
            position[rank] += 1
            runnable += waiting.pop(action, ())
    if not end or len(end) != sum(map(len, schedule.actions)):
        validate(schedule)
        raise AssertionError("the simulator got stuck in a schedule that is valid")
    ideal = max(schedule.num_microbatches * entry.total for rank, entry in enumerate(per_rank) if stages_per_rank[rank])
    return Report(max(end.values()), ideal, _peak_live(schedule), start, end)


def _durations(costs: PhaseCosts, phases: frozenset[Phase], num_stages: int) -> dict[Phase, float]:
    """Time of every phase of one of a rank's stages."""
    times = {phase: costs.of(phase) for phase in Phase}
    for deferred, origin in DEFERRED_PHASES.items():
        if deferred not in phases:
            times[origin] += times[deferred]
    return {phase: time / num_stages for phase, time in times.items()}


def _peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Most live micro-batches per rank; a rank runs one action at a time, so its order alone decides."""
    peaks = []
    for rank, order in enumerate(schedule.actions):
        num_stages = schedule.placement.count(rank)
        stages_done: Counter[int] = Counter()
        live: set[int] = set()
        peak = 0
        for action in order:
            if action.phase is Phase.FE:
                live.add(action.microbatch)
                peak = max(peak, len(live))
            elif action.phase is Phase.BE:
                stages_done[action.microbatch] += 1
                if stages_done[action.microbatch] == num_stages:
                    live.discard(action.microbatch)
        peaks.append(peak)
    return tuple(peaks)
