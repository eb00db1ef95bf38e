"""Runs steps of whole meshes on emulated devices: pipelines side by side, and micro-batches of any size."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta

from lightning_januspipe.bench.emulate.mesh_rank import MeshRecord, MeshWork, emulate_mesh_rank
from lightning_januspipe.engine.timeline import Span, recorded_report
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import PhaseCosts, Report, Schedule, StateCosts, simulate
from lightning_januspipe.schedule.costs import Costs, State, action_times, state_per_stage
from lightning_januspipe.testing import RankPool


@dataclass(frozen=True)
class EmulatedStep:
    """Holds one step of a mesh. Times are in seconds after the common start of all ranks.

    Attributes:
        simulated: Time of the slowest replica, whose micro-batches take as long as their largest load, without any
            cost of messages, exchanges and reductions.
        actions: For each global rank, its actions as they ran.
        exchanges: For each global rank, the times of its exchanges with the other graph ranks, by action.
        reductions: For each global rank, start and end of the reduction of gradients.
    """

    simulated: float
    actions: tuple[tuple[Span, ...], ...]
    exchanges: tuple[tuple[Span, ...], ...]
    reductions: tuple[tuple[float, float], ...]

    @property
    def makespan(self) -> float:
        """Returns the time until the last rank has its gradients."""
        return max(end for _, end in self.reductions)


@dataclass(frozen=True)
class EmulatedMesh:
    """Holds steps of a mesh, and times of the runtime itself: medians over all ranks and steps, in seconds.

    Attributes:
        steps: The steps, in their order.
        latency: Time from the sending of a message to its arrival.
        oversleep: Excess of a phase over its asked time, without its exchange.
        handover: Time from the end of an action to the start of an action on another rank that waited for it.
        turnaround: Time from the end of an action to the start of the next one on its rank, where that one waited for
            no message.
        exchange: Time from the arrival of the last graph rank at an exchange to the end of the exchange on all ranks;
            0 without exchanges.
        reduction: Time of a reduction of gradients, counted in the same way over all ranks that hold a stage.
        cpu: Share of one core that the busiest rank's process used.
        urgent: Whether all ranks ran with priority over other programs on the machine.
    """

    steps: tuple[EmulatedStep, ...]
    latency: float
    oversleep: float
    handover: float
    turnaround: float
    exchange: float
    reduction: float
    cpu: float
    urgent: bool


def emulate_mesh(
    shape: MeshShape,
    schedule: Schedule,
    costs: Costs,
    steps: Sequence[MeshWork],
    *,
    seconds_per_unit: float,
    message_bytes: int = 1024,
    pool: RankPool | None = None,
    state: State | None = None,
) -> EmulatedMesh:
    """Runs steps on an emulated mesh, one process for each rank.

    Every replica has micro-batches of its own. Graph ranks meet in an all-to-all of a few bytes at the start of every
    phase of a sharded micro-batch (with a model, they meet before every layer that needs neighbours). When all actions
    have ended, gradients are summed over the graph ranks and averaged over the replicas as in training; they have 64
    entries, so that the wait for other ranks is measured and not the time of large messages. Exchanges for the loss are
    left out.

    Args:
        shape: Sizes of the mesh.
        schedule: The schedule that every pipeline runs.
        costs: Times of one rank's share for a micro-batch with load 1.
        steps: For every step, the micro-batches of all replicas.
        seconds_per_unit: Seconds in one unit of the costs.
        message_bytes: Bytes of the boundary between two stages.
        pool: The processes; None starts some for this call.
        state: Costs of the changes of sharded state, if the schedule has any. They are real collectives of a few bytes
            that take the given time beside the phases, and take the place of the reduction at the end.

    Raises:
        ValueError: An argument is not positive, the work does not fit the mesh and the schedule, or the pool has too
            few processes.
        RankError: A rank failed; with an :class:`EmulationError`, a message reached the wrong action.
    """
    for name, value in (("seconds_per_unit", seconds_per_unit), ("message_bytes", message_bytes)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}; expected a positive number")
    if schedule.num_ranks != shape.pipeline:
        raise ValueError(f"{schedule.name!r} has {schedule.num_ranks} ranks; expected {shape.pipeline}, as the mesh")
    if pool is not None and pool.size < shape.size:
        raise ValueError(f"the mesh has {shape.size} ranks, but the pool has {pool.size} processes")
    if not steps:
        raise ValueError("there are no steps; expected at least one")
    for work in steps:
        _check(work, shape, schedule)
    seconds = in_seconds(costs, seconds_per_unit)
    changes = None if state is None else state_in_seconds(schedule, state, seconds_per_unit)
    simulated = [_simulated(schedule, seconds, work, changes) for work in steps]
    # A rank may have to wait for a whole step; the rest is for what else the machine does.
    timeout = 60 + 3 * max(simulated)
    with nullcontext(pool) if pool is not None else device_pool(shape.size) as ranks:
        records = ranks.run(
            emulate_mesh_rank,
            shape,
            schedule,
            seconds,
            list(steps),
            message_bytes,
            timedelta(seconds=timeout),
            changes,
            world_size=shape.size,
            timeout=120 + timeout + 3 * sum(simulated),
        )
    return _evaluated(shape, schedule, seconds, steps, simulated, records)


def _check(work: MeshWork, shape: MeshShape, schedule: Schedule) -> None:
    found = [len(mine) for mine in work]
    if found != [schedule.num_microbatches] * shape.data:
        raise ValueError(
            f"the replicas have {found} micro-batches; expected {schedule.num_microbatches} of each of {shape.data}"
        )
    for entry in (entry for mine in work for entry in mine):
        if len(entry.loads) != shape.graph or not all(load > 0 for load in entry.loads):
            raise ValueError(f"the loads of a micro-batch are {entry.loads}; expected {shape.graph} positive numbers")
        if entry.is_sharded and shape.graph == 1:
            raise ValueError("a micro-batch is sharded, but there is one graph rank")


def _simulated(schedule: Schedule, costs: Costs, work: MeshWork, state: State | None) -> float:
    loads = [[max(entry.loads) for entry in mine] for mine in work]
    return max(simulate(schedule, costs, weights=weights, state=state).makespan for weights in loads)


def _evaluated(
    shape: MeshShape,
    schedule: Schedule,
    costs: Costs,
    works: Sequence[MeshWork],
    simulated: Sequence[float],
    records: Sequence[MeshRecord],
) -> EmulatedMesh:
    steps = tuple(
        EmulatedStep(
            simulated[i],
            tuple(tuple(record.actions[i]) for record in records),
            tuple(tuple(record.exchanges[i]) for record in records),
            tuple(record.reductions[i] for record in records),
        )
        for i in range(len(works))
    )
    asked = action_times(schedule, costs)
    oversleeps, handovers, turnarounds, exchanges, reductions = [], [], [], [], []
    for step, work in zip(steps, works, strict=True):
        for rank, spans in enumerate(step.actions):
            _, data, graph = shape.coordinates(rank)
            met = {span.action: span.end - span.start for span in step.exchanges[rank]}
            for span in (span for span in spans if not span.action.changes_state):
                load = work[data][span.action.microbatch].loads[graph]
                sleep = load * asked(span.action.phase, span.action.stage)
                oversleeps.append(span.end - span.start - met.get(span.action, 0.0) - sleep)
        for pipeline in _pipelines(shape):
            report = recorded_report(schedule, {p: step.actions[rank] for p, rank in enumerate(pipeline)})
            waited, went_on = pauses(schedule, report)
            handovers += waited
            turnarounds += went_on
        for group in _graph_groups(shape):
            for spans in zip(*(step.exchanges[rank] for rank in group), strict=True):
                exchanges.append(_together((span.start, span.end) for span in spans))
        for p in range(shape.pipeline):
            holders = [shape.rank(p, d, g) for d in range(shape.data) for g in range(shape.graph)]
            reductions.append(_together(step.reductions[rank] for rank in holders))
    return EmulatedMesh(
        steps,
        statistics.median([latency for record in records for latency in record.latencies] or [0.0]),
        statistics.median(oversleeps),
        statistics.median(handovers or [0.0]),
        statistics.median(turnarounds or [0.0]),
        statistics.median(exchanges or [0.0]),
        statistics.median(reductions),
        max(used / step.makespan for record in records for used, step in zip(record.cpu, steps, strict=True)),
        all(all(record.urgent) for record in records),
    )


def _together(times: Iterable[tuple[float, float]]) -> float:
    """Returns the time from the last start to the last end."""
    starts, ends = zip(*times, strict=True)
    return max(ends) - max(starts)


def _pipelines(shape: MeshShape) -> list[list[int]]:
    return [[shape.rank(p, d, g) for p in range(shape.pipeline)] for d in range(shape.data) for g in range(shape.graph)]


def _graph_groups(shape: MeshShape) -> list[list[int]]:
    return [[shape.rank(p, d, g) for g in range(shape.graph)] for p in range(shape.pipeline) for d in range(shape.data)]


def device_pool(size: int) -> RankPool:
    """Returns processes that are forked from one with all imports done, so that many fit on one machine."""
    return RankPool(size, preload=("lightning_januspipe.bench.emulate",))


def in_seconds(costs: Costs, seconds_per_unit: float) -> PhaseCosts | list[PhaseCosts]:
    """Returns costs in seconds."""

    def scaled(entry: PhaseCosts) -> PhaseCosts:
        return PhaseCosts(**{f.name: seconds_per_unit * getattr(entry, f.name) for f in fields(entry)})

    return scaled(costs) if isinstance(costs, PhaseCosts) else [scaled(entry) for entry in costs]


def state_in_seconds(schedule: Schedule, state: State, seconds_per_unit: float) -> list[StateCosts]:
    """Returns the costs of the sharded state of every stage, in seconds."""
    entries = state_per_stage(state, schedule.num_ranks, schedule.num_stages)
    return [replace(e, gather=e.gather * seconds_per_unit, reduce=e.reduce * seconds_per_unit) for e in entries]


def pauses(schedule: Schedule, report: Report) -> tuple[list[float], list[float]]:
    """Returns the times from the end of an action to the next start: on another rank that waited, and on the same."""
    handovers, turnarounds = [], []
    for order in schedule.actions:
        free: float | None = None
        for action in (action for action in order if not action.changes_state):
            came = max((report.end[m.source] for m in schedule.received(action)), default=None)
            if came is not None and (free is None or came > free):
                handovers.append(report.start[action] - came)
            elif free is not None:
                turnarounds.append(report.start[action] - free)
            free = report.end[action]
    return handovers, turnarounds
