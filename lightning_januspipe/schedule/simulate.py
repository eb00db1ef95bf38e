"""Times a schedule: when each action starts and ends, how long the step takes, and which bytes ranks hold meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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
    run = _SimulatedRun(schedule, action_times(schedule, costs), comm, factors, state or StateCosts())
    run.until_its_end()
    start, end = run.start, run.end
    if not end or len(end) != sum(map(len, schedule.actions)):
        validate_schedule(schedule)
        raise AssertionError("the simulator got stuck in a schedule that is valid")
    curves = () if memory is None else memory_over_time(schedule, start, end, memory, state)
    ideal = ideal_time(schedule, costs) * sum(factors) / len(factors)
    return Report(max(end.values()), ideal, peak_live(schedule), start, end, tuple(run.busy), curves)


class _SimulatedRun:
    """Runs the actions of all ranks in simulated time.

    Args:
        schedule: The schedule.
        times: Returns the time of a phase of a stage.
        link: What a message costs.
        factors: Factor of the times of each micro-batch.
        state: Costs of the changes of sharded state.

    Attributes:
        start: When each action has started; actions that have not run are missing.
        end: When it has ended.
        busy: How long each rank has computed.
    """

    def __init__(
        self, schedule: Schedule, times: Callable[[Phase, int], float], link: Link, factors: list[float], state: State
    ) -> None:
        self.start: dict[Action, float] = {}
        self.end: dict[Action, float] = {}
        self.busy = [0.0] * schedule.num_ranks
        self._schedule, self._times, self._link, self._factors = schedule, times, link, factors
        self._states = state_per_stage(state, schedule.num_ranks, schedule.num_stages)
        self._table, self._num_dependencies = dependency_table(schedule)
        self._needs = {phase: [entry.needs for entry in of_phase] for phase, of_phase in self._table.items()}
        # When a dependency is met, by micro-batch times dependencies plus dependency, and the ranks that wait for it.
        self._met: dict[int, float] = {}
        self._waiting: dict[int, int] = {}
        self._channel_free: dict[tuple[int, int], float] = {}
        self._gathered: dict[tuple[int, int], float] = {}
        self._collectives_end = [0.0] * schedule.num_ranks
        self._clock = [0.0] * schedule.num_ranks
        self._runnable = list(range(schedule.num_ranks))

    def until_its_end(self) -> None:
        """Runs actions until all have run, or until each rank waits for another."""
        orders = [iter(order) for order in self._schedule.actions]
        following = [next(order, None) for order in orders]
        while self._runnable:
            rank = self._runnable.pop()
            action = following[rank]
            while action is not None and self._runs(rank, action):
                action = next(orders[rank], None)
            following[rank] = action

    def _runs(self, rank: int, action: Action) -> bool:
        """Runs the next action of a rank, if it can run by now."""
        phase, stage, microbatch = action
        if not 0 <= stage < self._schedule.num_stages or action in self.end:
            return False
        entry, first = self._table[phase][stage], microbatch * self._num_dependencies
        if entry.rank != rank:
            return False
        if action.changes_state:
            self._change_state(rank, action)
            return True
        ready, met = max(self._clock[rank], self._gathered.get((rank, stage), 0.0)), self._met
        for index in self._needs[phase][stage]:
            time = met.get(first + index)
            if time is None:
                self._waiting[first + index] = rank
                return False
            ready = max(ready, time)
        duration = self._times(phase, stage) * self._factors[microbatch]
        self.start[action] = ready
        self.end[action] = self._clock[rank] = ended = ready + duration
        self.busy[rank] += duration
        for index in entry.local_outputs:
            met[first + index] = ended
        for target, index in entry.sends:
            self._send(rank, target, first + index)
        return True

    def _send(self, rank: int, target: int, dependency: int) -> None:
        """Sends a message, which follows the one before it between the same ranks."""
        before = self._channel_free.get((rank, target), 0.0)
        self._channel_free[rank, target] = gone = max(self._clock[rank], before) + self._link.occupied
        self._met[dependency] = gone + self._link.latency
        if dependency in self._waiting:
            self._runnable.append(self._waiting.pop(dependency))

    def _change_state(self, rank: int, action: Action) -> None:
        """Gathers, releases or reduces the state of a stage, beside what the rank computes."""
        phase, stage, now = action.phase, action.stage, self._clock[rank]
        self.start[action] = self.end[action] = now
        if phase is not Phase.RESHARD:
            lasts = self._states[stage].gather if phase is Phase.UNSHARD else self._states[stage].reduce
            self.start[action] = begins = max(now, self._collectives_end[rank])
            self.end[action] = self._collectives_end[rank] = begins + lasts
        if phase is Phase.UNSHARD:
            self._gathered[rank, stage] = self.end[action]


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
