"""Greedy event-driven list scheduling: every free rank starts the most urgent action that is ready."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_januspipe.schedule.actions import CHAIN_PHASES, Action, Phase
from lightning_januspipe.schedule.costs import PhaseCosts, durations

DEPTH_FIRST = (Phase.BE, Phase.BF, Phase.FF, Phase.FE)
"""The micro-batch that is furthest along goes first, as in 1F1B."""

BREADTH_FIRST = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)
"""Every micro-batch gets a phase before one of them gets the next phase."""

_PHASES = (*CHAIN_PHASES, Phase.WF, Phase.WE)
_WF, _WE = 4, 5


@dataclass(frozen=True)
class Priority:
    """What a rank prefers among the actions that are ready.

    Micro-batches are grouped in units of ``unit``. Older units go first, then the phase that comes earlier in
    ``phases``, then the older micro-batch. Deferred weight gradients come after everything else.

    Args:
        phases: FE, FF, BF and BE, the most urgent first.
        unit: Micro-batches per unit.
        overlap: Count the backward wave (BF, BE) of a unit as equally old as the forward wave (FE, FF) of the next
            unit, so that ``phases`` decides between the two.
    """

    phases: tuple[Phase, ...]
    unit: int
    overlap: bool = False

    def table(self, num_microbatches: int) -> list[list[int]]:
        """Urgency of every chain phase (in chain order) and micro-batch; lower goes first and no two are equal."""
        urgency = []
        for index, phase in enumerate(CHAIN_PHASES):
            wave = index // 2 if self.overlap else 0
            place = self.phases.index(phase)
            ages = (microbatch // self.unit + wave for microbatch in range(num_microbatches))
            urgency.append([(age * len(CHAIN_PHASES) + place) * num_microbatches + m for m, age in enumerate(ages)])
        return urgency


@dataclass(frozen=True)
class Chain:
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
    def folded(cls, num_ranks: int, costs: Sequence[PhaseCosts], placement: tuple[int, ...], latency: float) -> Chain:
        """All phases of a stage on one rank."""
        return cls(num_ranks, costs, placement, placement, latency)

    def durations(self, deferred: bool) -> list[list[float]]:
        """Time of every phase (in the order of the chain, then WF and WE) of every stage."""
        apart = [a != b for a, b in zip(self.placement, self.force_placement, strict=True)]
        tables = [durations(entry, deferred, is_apart) for entry, is_apart in zip(self.costs, apart, strict=True)]
        return [[table[phase] for phase in _PHASES] for table in tables]


@dataclass(frozen=True)
class ListSchedule:
    """An order of actions per rank, and its makespan under the costs that it was made with."""

    actions: tuple[tuple[Action, ...], ...]
    makespan: float


def list_schedule(
    chain: Chain,
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
    run = _Run(chain, num_microbatches, priority, max_live, deferred, deadline)
    return run.finish()


class _Run:
    """The state of one list scheduling; an action is a tuple of urgency, phase index, stage and micro-batch."""

    def __init__(
        self,
        chain: Chain,
        num_microbatches: int,
        priority: Priority,
        max_live: int,
        deferred: bool,
        deadline: float,
    ) -> None:
        num_ranks, self.num_stages = chain.num_ranks, len(chain.placement)
        self.chain, self.num_microbatches = chain, num_microbatches
        self.max_live, self.deferred, self.deadline = max_live, deferred, deadline
        self.duration = chain.durations(deferred)
        self.urgency = priority.table(num_microbatches)
        self.rank_of = [chain.placement if i in (0, 3, _WE) else chain.force_placement for i in range(len(_PHASES))]
        num_phases = len(_PHASES) if deferred else len(CHAIN_PHASES)
        self.work_left = [0.0] * num_ranks
        self.actions_of = [0] * num_ranks
        for phase in range(num_phases):
            for stage, rank in enumerate(self.rank_of[phase]):
                self.work_left[rank] += num_microbatches * self.duration[stage][phase]
                self.actions_of[rank] += 1
        self.now = 0.0
        self.admitted = 0
        self.entry = chain.placement[0]
        self.ready: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_ranks)]
        self.weights: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
        self.left: list[dict[int, int]] = [{} for _ in range(num_ranks)]
        self.busy = [False] * num_ranks
        self.orders: list[list[Action]] = [[] for _ in range(num_ranks)]
        self.events: list[tuple[float, int, int, int, int, int]] = []

    def finish(self) -> ListSchedule | None:
        if not self.start(self.entry):
            return None
        events, busy = self.events, self.busy
        while events:
            self.now = events[0][0]
            # Rounding must not decide between actions that end at the same time.
            same_time = self.now * (1.0 + 1e-12)
            touched = set()
            while events and events[0][0] <= same_time:
                _, is_arrival, rank, phase, stage, microbatch = heapq.heappop(events)
                touched.add(rank)
                if is_arrival:
                    heapq.heappush(self.ready[rank], (self.urgency[phase][microbatch], phase, stage, microbatch))
                else:
                    busy[rank] = False
                    touched.add(self.end(rank, phase, stage, microbatch))
            for rank in sorted(touched):
                if not busy[rank] and not self.start(rank):
                    return None
        assert all(
            len(order) == count * self.num_microbatches
            for order, count in zip(self.orders, self.actions_of, strict=True)
        ), "the list scheduler got stuck"
        return ListSchedule(tuple(map(tuple, self.orders)), self.now)

    def start(self, rank: int) -> bool:
        """Start the most urgent ready action of a rank, if any; False if the deadline cannot be met any more."""
        ready, weights, left = self.ready[rank], self.weights[rank], self.left[rank]
        best = ready[0] if ready else None
        admits = False
        if rank == self.entry and self.admitted < self.num_microbatches and len(left) < self.max_live:
            first = (self.urgency[0][self.admitted], 0, 0, self.admitted)
            if best is None or first < best:
                best, admits = first, True
        opens = best is not None and best[3] not in left
        if weights and (best is None or (opens and len(left) >= self.max_live)):
            microbatch, phase, stage = heapq.heappop(weights)
        elif best is None:
            return True
        else:
            _, phase, stage, microbatch = best
            if admits:
                self.admitted += 1
            else:
                heapq.heappop(ready)
            if opens:
                left[microbatch] = self.actions_of[rank]
        if self.now + self.work_left[rank] >= self.deadline:
            return False
        duration = self.duration[stage][phase]
        self.busy[rank] = True
        self.work_left[rank] -= duration
        self.orders[rank].append(Action(_PHASES[phase], stage, microbatch))
        heapq.heappush(self.events, (self.now + duration, False, rank, phase, stage, microbatch))
        return True

    def end(self, rank: int, phase: int, stage: int, microbatch: int) -> int:
        """Make ready what follows an action that ended; return the rank that this concerns."""
        left = self.left[rank]
        left[microbatch] -= 1
        if not left[microbatch]:
            del left[microbatch]
        if phase >= _WF:
            return rank
        if self.deferred and phase >= 2:
            heapq.heappush(self.weights[rank], (microbatch, _WF if phase == 2 else _WE, stage))
        following = stage + 1 if phase % 2 == 0 else stage - 1
        if not 0 <= following < self.num_stages:
            following, phase = stage, phase + 1
            if phase == len(CHAIN_PHASES):
                return rank
        target = self.rank_of[phase][following]
        if target != rank and self.chain.latency:
            event = (self.now + self.chain.latency, True, target, phase, following, microbatch)
            heapq.heappush(self.events, event)
        else:
            heapq.heappush(self.ready[target], (self.urgency[phase][microbatch], phase, following, microbatch))
        return target
