"""Runs schedules on emulated devices and compares them with their simulation."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from lightning_januspipe.bench.emulate.emulated_mesh import emulate_mesh, in_seconds
from lightning_januspipe.bench.emulate.mesh_rank import MicrobatchWork
from lightning_januspipe.engine.timeline import recorded_report
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import Report, Schedule, simulate
from lightning_januspipe.schedule.costs import Costs
from lightning_januspipe.testing import RankPool


@dataclass(frozen=True)
class EmulatedRun:
    """Holds a schedule as simulated, and as run on emulated devices. Times are in seconds.

    Attributes:
        schedule: The schedule that was run.
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
        """Returns the median makespan of the steps."""
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
        schedule: The schedule to run.
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
    if not repeats > 0:
        raise ValueError(f"repeats={repeats!r}; expected a positive number")
    shape, work = MeshShape(schedule.num_ranks, 1, 1), [[MicrobatchWork((1.0,))] * schedule.num_microbatches]
    mesh = emulate_mesh(
        shape,
        schedule,
        costs,
        [work] * repeats,
        seconds_per_unit=seconds_per_unit,
        message_bytes=message_bytes,
        pool=pool,
    )
    seconds = in_seconds(costs, seconds_per_unit)
    simulated = simulate(schedule, seconds)
    makespans = tuple(max(span.end for spans in step.actions for span in spans) for step in mesh.steps)
    step = makespans.index(statistics.median_low(makespans))
    report = recorded_report(schedule, dict(enumerate(mesh.steps[step].actions)))
    return EmulatedRun(
        schedule=schedule,
        simulated=simulated,
        with_messages=simulate(schedule, seconds, comm=mesh.latency),
        latency=mesh.latency,
        makespans=makespans,
        report=replace(report, makespan=makespans[step], ideal=simulated.ideal),
        oversleep=mesh.oversleep,
        handover=mesh.handover,
        turnaround=mesh.turnaround,
        cpu=mesh.cpu,
        urgent=mesh.urgent,
    )
