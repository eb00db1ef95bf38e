"""Runs schedules on emulated devices and compares them with their simulation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta

from lightning_januspipe.bench.emulate.rank import RankRecord, emulate_rank
from lightning_januspipe.engine.timeline import Span, recorded_report
from lightning_januspipe.schedule import PhaseCosts, Report, Schedule, simulate
from lightning_januspipe.schedule.costs import Costs, action_times
from lightning_januspipe.testing import RankPool


@dataclass(frozen=True)
class EmulatedRun:
    """Holds a schedule as simulated, and as run on emulated devices. Times are in seconds.

    Attributes:
        schedule: The schedule.
        simulated: Its simulation without any cost of messages.
        with_messages: Its simulation with the measured latency of a message.
        latency: Median time from the sending of a message to its arrival.
        makespans: For every step, the time from the common start of all ranks to the last end.
        report: The step with the median makespan, as it ran.
        oversleep: Median excess of a phase over its asked time.
        handover: Median time from the end of an action to the start of an action on another rank that waited for it.
        turnaround: Median time from the end of an action to the start of the next one on its rank, where that one
            waited for no message.
        cpu: Share of one core that the busiest rank's process used, all its threads together.
        urgent: Whether all ranks ran with priority over other programs on the machine.
    """

    schedule: Schedule
    simulated: Report
    with_messages: Report
    latency: float
    makespans: tuple[float, ...]
    report: Report
    oversleep: float
    handover: float
    turnaround: float
    cpu: float
    urgent: bool

    @property
    def makespan(self) -> float:
        """Median makespan of the steps."""
        return statistics.median_low(self.makespans)

    @property
    def error(self) -> float:
        """Excess of the steps over their simulation with messages, as a share."""
        return self.makespan / self.with_messages.makespan - 1


def emulate(
    schedule: Schedule,
    costs: Costs,
    *,
    seconds_per_unit: float,
    repeats: int = 3,
    message_bytes: int = 1024,
    pool: RankPool | None = None,
) -> EmulatedRun:
    """Runs a schedule on emulated devices, one process for each rank, and compares it with its simulation.

    Args:
        schedule: The schedule.
        costs: Phase times, as in :func:`~lightning_januspipe.schedule.simulate`.
        seconds_per_unit: Seconds in one unit of the costs; phases of less than a few milliseconds measure the machine
            and not the schedule.
        repeats: Number of steps.
        message_bytes: Bytes of the boundary between two stages; a message has some more for energies and forces.
        pool: The processes; None starts some for this call.

    Raises:
        ValueError: An argument is not positive, or the pool has too few processes.
        RankError: A rank failed; with an :class:`EmulationError`, a message reached the wrong action.
    """
    for name, value in (("seconds_per_unit", seconds_per_unit), ("repeats", repeats), ("message_bytes", message_bytes)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}; expected a positive number")
    if pool is not None and pool.size < schedule.num_ranks:
        raise ValueError(f"{schedule.name!r} has {schedule.num_ranks} ranks, but the pool has {pool.size} processes")
    seconds = in_seconds(costs, seconds_per_unit)
    simulated = simulate(schedule, seconds)
    # A rank may have to wait for a whole step; the rest is for what else the machine does.
    timeout = 60 + 3 * simulated.makespan
    with nullcontext(pool) if pool is not None else device_pool(schedule.num_ranks) as ranks:
        records = ranks.run(
            emulate_rank,
            schedule,
            seconds,
            repeats,
            message_bytes,
            timedelta(seconds=timeout),
            world_size=schedule.num_ranks,
            timeout=120 + (repeats + 1) * timeout,
        )
    return _evaluated(schedule, seconds, simulated, records)


def device_pool(size: int) -> RankPool:
    """Returns processes that are forked from one with all imports done, so that many fit on one machine."""
    return RankPool(size, preload=("lightning_januspipe.bench.emulate",))


def in_seconds(costs: Costs, seconds_per_unit: float) -> PhaseCosts | list[PhaseCosts]:
    """Returns costs in seconds."""

    def scaled(entry: PhaseCosts) -> PhaseCosts:
        return PhaseCosts(**{f.name: seconds_per_unit * getattr(entry, f.name) for f in fields(entry)})

    return scaled(costs) if isinstance(costs, PhaseCosts) else [scaled(entry) for entry in costs]


def _evaluated(schedule: Schedule, costs: Costs, simulated: Report, records: Sequence[RankRecord]) -> EmulatedRun:
    latencies = [latency for record in records for latency in record.latencies]
    latency = statistics.median(latencies) if latencies else 0.0
    makespans = tuple(
        max(end for times in steps for _, end in times) for steps in zip(*(r.times for r in records), strict=True)
    )
    step = makespans.index(statistics.median_low(makespans))
    spans = {
        rank: [Span(a, *times) for a, times in zip(order, record.times[step], strict=True)]
        for rank, (order, record) in enumerate(zip(schedule.actions, records, strict=True))
    }
    report = replace(recorded_report(schedule, spans), makespan=makespans[step], ideal=simulated.ideal)
    asked = action_times(schedule, costs)
    handovers, turnarounds = pauses(schedule, report)
    return EmulatedRun(
        schedule=schedule,
        simulated=simulated,
        with_messages=simulate(schedule, costs, comm=latency),
        latency=latency,
        makespans=makespans,
        report=report,
        oversleep=statistics.median(
            s.end - s.start - asked(s.action.phase, s.action.stage) for of in spans.values() for s in of
        ),
        handover=statistics.median(handovers or [0.0]),
        turnaround=statistics.median(turnarounds or [0.0]),
        cpu=max(record.cpu[step] for record in records) / makespans[step],
        urgent=all(all(record.urgent) for record in records),
    )


def pauses(schedule: Schedule, report: Report) -> tuple[list[float], list[float]]:
    """Returns the times from the end of an action to the next start: on another rank that waited, and on the same."""
    handovers, turnarounds = [], []
    for order in schedule.actions:
        free: float | None = None
        for action in order:
            came = max((report.end[m.source] for m in schedule.received(action)), default=None)
            if came is not None and (free is None or came > free):
                handovers.append(report.start[action] - came)
            elif free is not None:
                turnarounds.append(report.start[action] - free)
            free = report.end[action]
    return handovers, turnarounds
