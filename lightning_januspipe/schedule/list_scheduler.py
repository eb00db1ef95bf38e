"""Makes an order of actions by greedy list scheduling: every free rank starts the most urgent action that is ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

from lightning_januspipe.schedule.actions import CRITICAL_PHASES, Action, Phase
from lightning_januspipe.schedule.costs import PhaseCosts, durations

DEPTH_FIRST = (Phase.BE, Phase.BF, Phase.FF, Phase.FE)
"""The micro-batch that is furthest along goes first, as in 1F1B."""

BREADTH_FIRST = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)
"""Every micro-batch gets a phase before one of them gets the next phase."""

_PHASES = (*CRITICAL_PHASES, Phase.WF, Phase.WE)
_WF, _WE = 4, 5


@dataclass(frozen=True)
class Priority:
    """Says which of its ready actions a rank starts first.

    Micro-batches are grouped in waves of ``wave_size``. Older waves go first, then the phase that comes earlier in
    ``phases``, then the older micro-batch. Deferred weight gradients come after everything else, unless a rank has put
    off more of them than it may.

    Args:
        phases: FE, FF, BF and BE, the most urgent first.
        wave_size: Micro-batches per wave.
        overlap: Whether the backward half (BF, BE) of a wave counts as equally old as the forward half (FE, FF) of the
            next wave, so that ``phases`` decides between the two.
        most_deferred: Most weight gradients that a rank may have put off when it starts another action, or None. They
            keep micro-batches live: under a tight cap, few of them let new micro-batches in earlier.
    """

    phases: tuple[Phase, ...]
    wave_size: int
    overlap: bool = False
    most_deferred: int | None = None

    def table(self, num_microbatches: int) -> list[list[int]]:
        """Returns the urgency of each of `CRITICAL_PHASES` and micro-batch; lower goes first and no two are equal."""
        urgency = []
        for index, phase in enumerate(CRITICAL_PHASES):
            half = index // 2 if self.overlap else 0
            order = self.phases.index(phase)
            ages = (microbatch // self.wave_size + half for microbatch in range(num_microbatches))
            urgency.append([(age * len(CRITICAL_PHASES) + order) * num_microbatches + m for m, age in enumerate(ages)])
        return urgency


@dataclass(frozen=True)
class PlacedStages:
    """Holds the stages of a pipeline, with their costs and the ranks that run them.

    Args:
        num_ranks: Number of pipeline ranks.
        costs: Costs of each stage.
        placement: The rank of FE, BE and WE of each stage.
        force_placement: The rank of FF, BF and WF of each stage.
        latency: Time that a message between two ranks takes.
    """

    num_ranks: int
    costs: Sequence[PhaseCosts]
    placement: tuple[int, ...]
    force_placement: tuple[int, ...]
    latency: float = 0.0

    @classmethod
    def folded(
        cls, num_ranks: int, costs: Sequence[PhaseCosts], placement: tuple[int, ...], latency: float
    ) -> PlacedStages:
        """Makes stages that have all phases on one rank."""
        return cls(num_ranks, costs, placement, placement, latency)

    def durations(self, deferred: bool) -> list[list[float]]:
        """Returns for every stage the time of FE, FF, BF, BE, WF and WE."""
        split = [a != b for a, b in zip(self.placement, self.force_placement, strict=True)]
        tables = [durations(entry, deferred, is_split) for entry, is_split in zip(self.costs, split, strict=True)]
        return [[table[phase] for phase in _PHASES] for table in tables]


@dataclass(frozen=True)
class ListSchedule:
    """Holds an order of actions per rank, and its makespan under the costs that it was made with.

    Most orders of a search are compared and dropped, so actions are made only where they are asked for.

    Args:
        orders: Per rank the actions as integers, ``(phase * num_stages + stage) * num_microbatches + microbatch``.
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        makespan: Time at which the last action ends.
    """

    orders: list[list[int]]
    num_stages: int
    num_microbatches: int
    makespan: float

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """Returns the actions of every rank, in order."""
        steps = [(phase, stage) for phase in _PHASES for stage in range(self.num_stages)]
        split = [[divmod(number, self.num_microbatches) for number in order] for order in self.orders]
        return tuple(tuple(Action(*steps[step], microbatch) for step, microbatch in order) for order in split)


def list_schedule(
    stages: PlacedStages,
    num_microbatches: int,
    priority: Priority,
    max_live: int,
    *,
    deferred: bool = False,
    deadline: float = math.inf,
) -> ListSchedule | None:
    """Lets every free rank start the most urgent action that is ready, until all have run.

    A rank begins a micro-batch only while it has fewer than ``max_live``. Where deferred weight gradients keep its
    micro-batches live, it runs these first. There always are some then, because the live micro-batches of every rank
    are among those that the first stage has begun.

    Args:
        stages: The stages with their costs and ranks.
        num_microbatches: Number of micro-batches.
        priority: Which of its ready actions a rank starts first.
        max_live: Most live micro-batches of a rank.
        deferred: Whether WF and WE are actions of their own.
        deadline: Time; the search ends as soon as the makespan is sure to reach it.

    Returns:
        The order of actions, or None if the makespan would reach ``deadline``.
    """
    return _ListScheduling(stages, num_microbatches, priority, max_live, deferred).finish(deadline)


class _ListScheduling:
    """Holds the state of one list scheduling.

    Everything that happens for each action is done with integers. A *step* is a phase of a stage, ``phase * num_stages
    + stage``. A ready action is a *key*, ``urgency * num_steps + step``: the least key is the most urgent, and it gives
    the micro-batch, because urgencies count through the micro-batches.
    """

    def __init__(
        self, stages: PlacedStages, num_microbatches: int, priority: Priority, max_live: int, deferred: bool
    ) -> None:
        num_ranks, num_stages = stages.num_ranks, len(stages.placement)
        num_phases = len(_PHASES) if deferred else len(CRITICAL_PHASES)
        self.num_microbatches, self.num_stages, self.num_steps = num_microbatches, num_stages, num_phases * num_stages
        self.max_live, self.latency, self.entry = max_live, stages.latency, stages.placement[0]
        self.urgency = priority.table(num_microbatches)
        self.most_deferred = math.inf if priority.most_deferred is None else priority.most_deferred
        by_stage = stages.durations(deferred)
        self.duration = [by_stage[stage][phase] for phase in range(num_phases) for stage in range(num_stages)]
        energies, forces = stages.placement, stages.force_placement
        self.rank_of = [r for phase in range(num_phases) for r in (energies if phase in (0, 3, _WE) else forces)]
        self.following = [self.next_step(step) for step in range(self.num_steps)]
        self.work_left, self.steps_per_rank = [0.0] * num_ranks, [0] * num_ranks
        for rank, duration in zip(self.rank_of, self.duration, strict=True):
            self.work_left[rank] += num_microbatches * duration
            self.steps_per_rank[rank] += 1
        self.now = 0.0
        self.admitted = 0
        self.ready: list[list[int]] = [[] for _ in range(num_ranks)]
        self.weights: list[list[int]] = [[] for _ in range(num_ranks)]
        self.left: list[dict[int, int]] = [{} for _ in range(num_ranks)]
        self.is_busy = [False] * num_ranks
        self.orders: list[list[int]] = [[] for _ in range(num_ranks)]
        # Time, the action as in `ListSchedule`, and whether its input arrives then. Otherwise it ends then.
        self.events: list[tuple[float, int, bool]] = []

    def next_step(self, step: int) -> int | None:
        """Returns the step that reads the output of a step."""
        phase, stage = divmod(step, self.num_stages)
        if phase >= _WF:
            return None
        after = stage + 1 if phase % 2 == 0 else stage - 1
        if 0 <= after < self.num_stages:
            return phase * self.num_stages + after
        return None if phase + 1 == len(CRITICAL_PHASES) else (phase + 1) * self.num_stages + stage

    def finish(self, deadline: float) -> ListSchedule | None:
        if not self.start(self.entry, deadline):
            return None
        events, is_busy = self.events, self.is_busy
        while events:
            self.now = events[0][0]
            # Rounding must not decide between actions that end at the same time.
            same_time = self.now * (1.0 + 1e-12)
            touched = set()
            while events and events[0][0] <= same_time:
                _, number, is_arrival = heappop(events)
                step, microbatch = divmod(number, self.num_microbatches)
                rank = self.rank_of[step]
                touched.add(rank)
                if is_arrival:
                    self.arrive(step, microbatch)
                else:
                    is_busy[rank] = False
                    following = self.end(rank, step, microbatch)
                    if following is not None:
                        touched.add(following)
            for rank in sorted(touched):
                if not is_busy[rank] and not self.start(rank, deadline):
                    return None
        done = sum(map(len, self.orders))
        assert done == self.num_steps * self.num_microbatches, "the list scheduler got stuck"
        return ListSchedule(self.orders, self.num_stages, self.num_microbatches, self.now)

    def start(self, rank: int, deadline: float) -> bool:
        """Starts the most urgent ready action of a rank, if any; False if the deadline cannot be met any more."""
        ready, weights, left = self.ready[rank], self.weights[rank], self.left[rank]
        num_microbatches = self.num_microbatches
        key = ready[0] if ready else None
        admits = opens = False
        if rank == self.entry and self.admitted < num_microbatches and len(left) < self.max_live:
            first = self.urgency[0][self.admitted] * self.num_steps
            if key is None or first < key:
                key, admits = first, True
        microbatch = -1
        if key is not None:
            microbatch = key // self.num_steps % num_microbatches
            opens = microbatch not in left
        is_full = opens and len(left) >= self.max_live
        if weights and (key is None or is_full or len(weights) > self.most_deferred):
            key = heappop(weights)
            microbatch = key // self.num_steps
        elif key is None:
            return True
        else:
            if admits:
                self.admitted += 1
            else:
                heappop(ready)
            if opens:
                left[microbatch] = self.steps_per_rank[rank]
        if self.now + self.work_left[rank] >= deadline:
            return False
        step = key % self.num_steps
        duration = self.duration[step]
        self.is_busy[rank] = True
        self.work_left[rank] -= duration
        number = step * num_microbatches + microbatch
        self.orders[rank].append(number)
        heappush(self.events, (self.now + duration, number, False))
        return True

    def end(self, rank: int, step: int, microbatch: int) -> int | None:
        """Makes the successor of an ended action ready, and returns its rank if it may start."""
        left = self.left[rank]
        if left[microbatch] == 1:
            del left[microbatch]
        else:
            left[microbatch] -= 1
        split = step + 2 * self.num_stages
        if split >= _WF * self.num_stages and split < self.num_steps:
            heappush(self.weights[rank], microbatch * self.num_steps + split)
        following = self.following[step]
        if following is None:
            return None
        target = self.rank_of[following]
        if target != rank and self.latency:
            number = following * self.num_microbatches + microbatch
            heappush(self.events, (self.now + self.latency, number, True))
            return None
        self.arrive(following, microbatch)
        return target

    def arrive(self, step: int, microbatch: int) -> None:
        """Makes an action ready."""
        urgency = self.urgency[step // self.num_stages][microbatch]
        heappush(self.ready[self.rank_of[step]], urgency * self.num_steps + step)
