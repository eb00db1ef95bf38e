"""Greedy event-driven list scheduling: every free rank starts the most urgent action that is ready."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from lightning_januspipe.schedule.actions import CHAIN_PHASES, Action, Costs, Phase, costs_per_rank

DEPTH_FIRST = (Phase.BE, Phase.BF, Phase.FF, Phase.FE)
"""The micro-batch that is furthest along goes first, as in 1F1B."""

BREADTH_FIRST = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)
"""Every micro-batch gets a phase before one of them gets the next phase."""


@dataclass(frozen=True)
class Priority:
    """What a rank prefers among the actions that are ready.

    Micro-batches are grouped in units of ``unit``. Older units go first, then the phase that comes earlier in
    ``phases``, then the older micro-batch.

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
class ListSchedule:
    """An order of actions per rank, and its makespan under the costs that it was made with."""

    actions: tuple[tuple[Action, ...], ...]
    makespan: float


def list_schedule(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    priority: Priority,
    max_live: int,
    *,
    deadline: float = math.inf,
) -> ListSchedule | None:
    """Let every free rank start the most urgent action that is ready, until all is done.

    Stage ``s`` runs on rank ``s``. A rank takes what a neighbour sends in the order in which it was sent, so that
    the order of messages never crosses. As each rank holds a subset of the micro-batches that rank 0 holds, a cap on
    rank 0's live micro-batches is a cap on every rank's.

    Args:
        num_ranks: Number of pipeline ranks, one stage on each.
        num_microbatches: Number of micro-batches.
        costs: Phase times, the same on all ranks or one entry per rank; nothing is deferred.
        priority: What a rank prefers.
        max_live: Most micro-batches between the start of their FE and the end of their BE on a rank.
        deadline: Give up as soon as the makespan is sure to reach this time.

    Returns:
        The order of actions, or None if the makespan would reach ``deadline``.
    """
    fused = [entry.fused() for entry in costs_per_rank(costs, num_ranks)]
    duration = [[entry.of(phase) for phase in CHAIN_PHASES] for entry in fused]
    work_left = [num_microbatches * entry.total for entry in fused]
    urgency = priority.table(num_microbatches)
    last = num_ranks - 1

    # On every rank: what came from the rank above, from the rank below, and what the rank itself left at a fold.
    from_above: list[deque[tuple[int, int]]] = [deque() for _ in range(num_ranks)]
    from_below: list[deque[tuple[int, int]]] = [deque() for _ in range(num_ranks)]
    at_fold: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    admitted, live = 0, 0
    busy = [False] * num_ranks
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    running: list[tuple[float, int, int, int]] = []

    def start(rank: int, now: float) -> bool:
        """Start the most urgent ready action of a rank, if any; False if the deadline cannot be met any more."""
        nonlocal admitted, live
        choices = []
        for source, queue in enumerate((from_above[rank], from_below[rank])):
            if queue:
                phase, microbatch = queue[0]
                choices.append((urgency[phase][microbatch], source, phase, microbatch))
        if at_fold[rank]:
            key, phase, microbatch = at_fold[rank][0]
            choices.append((key, 2, phase, microbatch))
        if rank == 0 and admitted < num_microbatches and live < max_live:
            choices.append((urgency[0][admitted], 3, 0, admitted))
        if not choices:
            return True
        _, source, phase, microbatch = min(choices)
        if source == 0:
            from_above[rank].popleft()
        elif source == 1:
            from_below[rank].popleft()
        elif source == 2:
            heapq.heappop(at_fold[rank])
        else:
            admitted += 1
            live += 1
        if now + work_left[rank] >= deadline:
            return False
        busy[rank] = True
        work_left[rank] -= duration[rank][phase]
        orders[rank].append(Action(CHAIN_PHASES[phase], rank, microbatch))
        heapq.heappush(running, (now + duration[rank][phase], rank, phase, microbatch))
        return True

    def hand_on(rank: int, phase: int, microbatch: int) -> int | None:
        """Make the next action of the chain ready and return its rank; None at the chain's end."""
        downward = phase % 2 == 0
        if downward and rank < last:
            from_above[rank + 1].append((phase, microbatch))
            return rank + 1
        if not downward and rank > 0:
            from_below[rank - 1].append((phase, microbatch))
            return rank - 1
        if phase == len(CHAIN_PHASES) - 1:
            return None
        heapq.heappush(at_fold[rank], (urgency[phase + 1][microbatch], phase + 1, microbatch))
        return rank

    now = 0.0
    if not start(0, now):
        return None
    while running:
        now = running[0][0]
        # Rounding must not decide between actions that end at the same time.
        same_time = now * (1.0 + 1e-12)
        touched = set()
        while running and running[0][0] <= same_time:
            _, rank, phase, microbatch = heapq.heappop(running)
            busy[rank] = False
            touched.add(rank)
            next_rank = hand_on(rank, phase, microbatch)
            if next_rank is None:
                live -= 1
            else:
                touched.add(next_rank)
        for rank in sorted(touched):
            if not busy[rank] and not start(rank, now):
                return None
    assert all(len(order) == len(CHAIN_PHASES) * num_microbatches for order in orders), "the list scheduler got stuck"
    return ListSchedule(tuple(map(tuple, orders)), now)


def lower_bound(costs: Costs, num_ranks: int, num_microbatches: int) -> float:
    """Least makespan that any folded schedule without deferral can have.

    A rank starts only when FE has come down to it, and after its last BE the ranks before it still owe theirs; with
    equal ranks that is M·T + (P-1)(t_FE + t_BE). One micro-batch takes P·T from end to end.
    """
    per_rank = [entry.fused() for entry in costs_per_rank(costs, num_ranks)]
    bound = sum(entry.total for entry in per_rank)
    ramp = 0.0
    for entry in per_rank:
        bound = max(bound, ramp + num_microbatches * entry.total)
        ramp += entry.fe + entry.be
    return bound
