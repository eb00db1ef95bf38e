"""Times a schedule: when each action starts and ends, how long the step takes, and which bytes ranks hold meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_januspipe.schedule.actions import DEFERRED_PHASES, Action, Phase, Schedule
from lightning_januspipe.schedule.costs import (
    Costs,
    Link,
    Memory,
    State,
    StateCosts,
    action_times,
    costs_per_stage,
    memory_per_stage,
    state_per_stage,
)
from lightning_januspipe.schedule.dependency_table import dependency_table
from lightning_januspipe.schedule.step_report import MemoryCurve, Report, peak_live
from lightning_januspipe.schedule.validate import validate_schedule


def simulate(
    schedule: Schedule,
    costs: Costs,
    *,
    comm: float | Link = 0.0,
    memory: Memory | None = None,
    weights: Sequence[float] | None = None,
    state: State | None = None,
) -> Report:
    """Runs a schedule in simulated time.

    Every action starts as soon as its rank has ended the action before and its messages have arrived. Messages travel
    beside the computation, as gathered parameters and reduced gradients do, one after the other on a rank. Where the
    schedule lacks WF and WE, their times are spent inside BF and BE.

    Args:
        schedule: The schedule to time.
        costs: Phase times of a rank's share for one micro-batch: one entry for all ranks, one per rank, or one per
            stage.
        comm: Cost of a message between two ranks: its latency, or a `Link`.
        memory: Bytes that a micro-batch holds between its phases, for the memory over time; given like ``costs``.
        weights: Factor of the times of each micro-batch; 1 for all by default.
        state: Costs of the changes of sharded state, given like ``costs``; none by default.

    Raises:
        ScheduleError: The schedule cannot run to its end.
        ValueError: ``comm`` is negative or not finite, or ``costs``, ``memory``, ``weights`` or ``state`` do not fit
            the schedule.
    """
    factors = [1.0] * schedule.num_microbatches if weights is None else list(weights)
    if len(factors) != schedule.num_microbatches or not all(math.isfinite(f) and f > 0 for f in factors):
        raise ValueError(f"weights is {weights!r}, expected {schedule.num_microbatches} positive numbers.")
    if not isinstance(comm, Link):
        if not (math.isfinite(comm) and comm >= 0):
            raise ValueError(f"comm is {comm!r}, expected a finite latency >= 0, or a Link.")
        comm = Link(latency=comm)
    times = action_times(schedule, costs)
    states = state_per_stage(state or StateCosts(), schedule.num_ranks, schedule.num_stages)
    gathered: dict[tuple[int, int], float] = {}
    collectives_end = [0.0] * schedule.num_ranks
    table, num_dependencies = dependency_table(schedule)
    needs = {phase: [entry.needs for entry in of_phase] for phase, of_phase in table.items()}
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    # When a dependency is met, by micro-batch times dependencies plus dependency, and the ranks that wait for it.
    met: dict[int, float] = {}
    waiting: dict[int, int] = {}
    channel_free: dict[tuple[int, int], float] = {}
    clock = [0.0] * schedule.num_ranks
    busy = [0.0] * schedule.num_ranks
    position = [0] * schedule.num_ranks
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        order = schedule.actions[rank]
        while position[rank] < len(order):
            action = order[position[rank]]
            phase, stage, microbatch = action
            if not 0 <= stage < schedule.num_stages or action in end:
                break
            entry, first = table[phase][stage], microbatch * num_dependencies
            if entry.rank != rank:
                break
            if action.changes_state:
                start[action] = end[action] = clock[rank]
                if phase is not Phase.RESHARD:
                    start[action] = max(clock[rank], collectives_end[rank])
                    lasts = states[stage].gather if phase is Phase.UNSHARD else states[stage].reduce
                    end[action] = collectives_end[rank] = start[action] + lasts
                if phase is Phase.UNSHARD:
                    gathered[rank, stage] = end[action]
                position[rank] += 1
                continue
            ready = max(clock[rank], gathered.get((rank, stage), 0.0))
            missing = None
            for index in needs[phase][stage]:
                time = met.get(first + index)
                if time is None:
                    missing = first + index
                    break
                ready = max(ready, time)
            if missing is not None:
                waiting[missing] = rank
                break
            duration = times(phase, stage) * factors[microbatch]
            start[action] = ready
            end[action] = clock[rank] = ready + duration
            busy[rank] += duration
            position[rank] += 1
            for index in entry.local_outputs:
                met[first + index] = clock[rank]
            for target, index in entry.sends:
                gone = max(clock[rank], channel_free.get((rank, target), 0.0)) + comm.occupied
                channel_free[rank, target] = gone
                met[first + index] = gone + comm.latency
                if first + index in waiting:
                    runnable.append(waiting.pop(first + index))
    if not end or len(end) != sum(map(len, schedule.actions)):
        validate_schedule(schedule)
        raise AssertionError("the simulator got stuck in a schedule that is valid")
    curves = () if memory is None else memory_over_time(schedule, start, end, memory, state)
    ideal = ideal_time(schedule, costs) * sum(factors) / len(factors)
    return Report(max(end.values()), ideal, peak_live(schedule), start, end, tuple(busy), curves)


def ideal_time(schedule: Schedule, costs: Costs) -> float:
    """Returns the time that the busiest rank works if nothing is computed twice; no order of the stages is faster.

    For an unfolded schedule, whose stages could be cut anywhere, it is an equal share of the whole work.
    """
    per_stage = costs_per_stage(costs, schedule.num_ranks, schedule.num_stages)
    if not schedule.is_folded:
        return schedule.num_microbatches * sum(entry.total for entry in per_stage) / schedule.num_ranks
    work = [0.0] * schedule.num_ranks
    for rank, entry in zip(schedule.placement, per_stage, strict=True):
        work[rank] += entry.total
    return schedule.num_microbatches * max(work)


def memory_over_time(
    schedule: Schedule,
    start: Mapping[Action, float],
    end: Mapping[Action, float],
    memory: Memory,
    state: State | None = None,
) -> tuple[MemoryCurve, ...]:
    """Returns for each rank the bytes that its micro-batches, and gathered or unreduced state, hold over time.

    Args:
        schedule: The schedule that was simulated or run.
        start: Start time of every action, from which the bytes that it allocates count.
        end: End time of every action, until which the bytes that it frees count.
        memory: Bytes of one micro-batch, given like the costs.
        state: Bytes of sharded state, given like the costs; they count where the schedule changes it.
    """
    states = state_per_stage(state or StateCosts(), schedule.num_ranks, schedule.num_stages)
    per_stage = memory_per_stage(memory, schedule.num_ranks, schedule.num_stages)
    deferred = not schedule.phases.isdisjoint(DEFERRED_PHASES)
    last_force = Phase.WF if deferred else Phase.BF
    last_energy = Phase.WE if deferred else Phase.BE
    curves = []
    for order in schedule.actions:
        changes: list[tuple[float, float]] = []
        # A stage has gradients from the first backward phase on.
        reduced = {action.stage for action in order if action.phase is Phase.REDUCE}
        for action in order:
            entry, is_split = per_stage[action.stage], schedule.is_split(action.stage)
            allocated = freed = 0.0
            if action.phase is Phase.UNSHARD:
                allocated = states[action.stage].parameters
            elif action.phase is Phase.RESHARD:
                freed = states[action.stage].parameters
            elif action.phase is Phase.REDUCE:
                freed = states[action.stage].gradients
            elif action.phase is Phase.FE:
                allocated = entry.energy
            elif action.phase is Phase.FF:
                allocated = entry.force + (entry.energy if is_split else 0.0)
            elif action.phase is Phase.BF and not is_split:
                allocated = entry.kept
            if action.phase is last_force:
                freed = entry.force + (entry.energy if is_split else 0.0)
            elif action.phase is last_energy:
                freed = entry.energy + (0.0 if is_split else entry.kept)
            if action.stage in reduced and action.phase in (Phase.BF, Phase.BE):
                allocated += states[action.stage].gradients
                reduced.remove(action.stage)
            changes += [(start[action], allocated), (end[action], -freed)]
        curve: list[tuple[float, float]] = [(0.0, 0.0)]
        held = 0.0
        # A rank computes one phase at a time, which frees its bytes before the next one allocates; what runs beside it
        # ends at any time.
        for time, change in sorted(changes, key=lambda change: change[0]):
            if change:
                held += change
                curve.append((time, max(held, 0.0)))
        curves.append(tuple(curve))
    return tuple(curves)
