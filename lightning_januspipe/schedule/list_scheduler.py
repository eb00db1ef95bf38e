"""Greedy event-driven list scheduling: every free rank starts the most urgent action that is ready."""

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
    """What a rank prefers among the actions that are ready.

    Micro-batches are grouped in units of ``unit``. Older units go first, then the phase that comes earlier in
    ``phases``, then the older micro-batch. Deferred weight gradients come after everything else, unless a rank owes
    more of them than it may.

    Args:
        phases: FE, FF, BF and BE, the most urgent first.
        unit: Micro-batches per unit.
        overlap: Count the backward wave (BF, BE) of a unit as equally old as the forward wave (FE, FF) of the next
            unit, so that ``phases`` decides between the two.
        most_deferred: Most weight gradients that a rank may owe when it starts something else, or None. They are what
            keeps micro-batches live: under a tight cap, owing few of them lets new ones in earlier.
    """

    phases: tuple[Phase, ...]
    unit: int
    overlap: bool = False
    most_deferred: int | None = None

    def table(self, num_microbatches: int) -> list[list[int]]:
        """Urgency of every chain phase (in chain order) and micro-batch; lower goes first and no two are equal."""
        urgency = []
        for index, phase in enumerate(CRITICAL_PHASES):
            wave = index // 2 if self.overlap else 0
            place = self.phases.index(phase)
            ages = (microbatch // self.unit + wave for microbatch in range(num_microbatches))
            urgency.append([(age * len(CRITICAL_PHASES) + place) * num_microbatches + m for m, age in enumerate(ages)])
        return urgency


@dataclass(frozen=True)
class PlacedStages:
    """The stages of a pipeline, their places and their costs.

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
        """All phases of a stage on one rank."""
        return cls(num_ranks, costs, placement, placement, latency)

    def durations(self, deferred: bool) -> list[list[float]]:
        """Time of every phase (in the order of the chain, then WF and WE) of every stage."""
        split = [a != b for a, b in zip(self.placement, self.force_placement, strict=True)]
        tables = [durations(entry, deferred, is_split) for entry, is_split in zip(self.costs, split, strict=True)]
        return [[table[phase] for phase in _PHASES] for table in tables]


@dataclass(frozen=True)
class ListSchedule:
    """An order of actions per rank, and its makespan under the costs that it was made with.

    Most orders of a search are compared and dropped, so the actions are spelled out only where they are asked for.

    Args:
        orders: Per rank the actions as numbers: ``(phase * num_stages + stage) * num_microbatches + microbatch``.
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        makespan: When the last action ends.
    """

    orders: list[list[int]]
    num_stages: int
    num_microbatches: int
    makespan: float

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """The actions of every rank, in order."""
        steps = [(phase, stage) for phase in _PHASES for stage in range(self.num_stages)]
        split = [[divmod(number, self.num_microbatches) for number in order] for order in self.orders]
        return tuple(tuple(Action(*steps[step], microbatch) for step, microbatch in order) for order in split)


def list_schedule(
    chain: PlacedStages,
    num_microbatches: int,
    priority: Priority,
    max_live: int,
    *,
    deferred: bool = False,
    deadline: float = math.inf,
) -> ListSchedule | None:
    """Let every free rank start the most urgent action that is ready, until all is done.

    A rank opens a micro-batch only while it holds fewer than ``max_live``. Where deferred weight gradients are what
    holds them, it does these first; there always are some then, as every rank's unfinished micro-batches are among
    those that the first stage's rank has admitted.

    Args:
        chain: Stages, places and costs.
        num_microbatches: Number of micro-batches.
        priority: What a rank prefers.
        max_live: Most micro-batches of which a rank holds something at once.
        deferred: Whether WF and WE are actions of their own.
        deadline: Give up as soon as the makespan is sure to reach this time.

    Returns:
        The order of actions, or None if the makespan would reach ``deadline``.
    """
    return _Run(chain, num_microbatches, priority, max_live, deferred).finish(deadline)


class _Run:
    """The state of one list scheduling.

    All that is done once for each action is done with numbers. A *step* is a phase of a stage, ``phase * num_stages +
    stage``. A ready action is a *key*, ``urgency * num_steps + step``: the least one is the most urgent, and it tells
    its micro-batch, as urgencies count through the micro-batches.
    """

    def __init__(
        self, chain: PlacedStages, num_microbatches: int, priority: Priority, max_live: int, deferred: bool
    ) -> None:
        num_ranks, num_stages = chain.num_ranks, len(chain.placement)
        num_phases = len(_PHASES) if deferred else len(CRITICAL_PHASES)
        self.num_microbatches, self.num_stages, self.num_steps = num_microbatches, num_stages, num_phases * num_stages
        self.max_live, self.latency, self.entry = max_live, chain.latency, chain.placement[0]
        self.urgency = priority.table(num_microbatches)
        self.most_deferred = math.inf if priority.most_deferred is None else priority.most_deferred
        by_stage = chain.durations(deferred)
        self.duration = [by_stage[stage][phase] for phase in range(num_phases) for stage in range(num_stages)]
        energies, forces = chain.placement, chain.force_placement
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
        # Time, number of the action as in `ListSchedule`, and whether it is the arrival of what the action needs.
        self.events: list[tuple[float, int, bool]] = []

    def next_step(self, step: int) -> int | None:
        """The step that takes in the output of a step."""
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
        """Start the most urgent ready action of a rank, if any; False if the deadline cannot be met any more."""
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
        """Make ready what follows an action that ended; return the rank that this concerns, if another one."""
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
        """Make an action ready."""
        urgency = self.urgency[step // self.num_stages][microbatch]
        heappush(self.ready[self.rank_of[step]], urgency * self.num_steps + step)
