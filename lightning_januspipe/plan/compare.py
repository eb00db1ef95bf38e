"""Builds and simulates the schedules of a plan: times in seconds, sizes in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_januspipe.runtime.state_share import StateShare, fastest_level, state_share
from lightning_januspipe.schedule import Link, PhaseCosts, Report, Schedule, StateCosts, build_schedule, simulate
from lightning_januspipe.schedule.actions import Message
from lightning_januspipe.schedule.bounds import lower_bound
from lightning_januspipe.schedule.build_schedule import DEFERRED, GENERATORS, SEARCHED, SEVERAL_STAGES, UNFOLDED
from lightning_januspipe.schedule.costs import Costs, Memory, costs_per_stage, format_bytes
from lightning_januspipe.schedule.request import Auto
from lightning_januspipe.schedule.state_actions import ShardLevel, seconds_after_phases, with_state_changes

BASELINE = "1f1b-2nd"
"""The schedule whose speed counts as 1."""

# As when training starts: more stages on a rank have to gain what their messages may cost.
_LEAST_GAIN = 0.02
_ROUNDING = 1e-9


@dataclass(frozen=True)
class CutCosts:
    """Holds the costs of a potential that is cut into stages in one way.

    Attributes:
        costs: Seconds of the phases, nothing deferred: of one rank's share, or one entry per stage.
        deferred: Seconds of the phases with WF and WE deferred; None takes ``costs``.
        memory: Bytes that a micro-batch holds between its phases, given like ``costs``; None where unknown.
        deferred_memory: Bytes of a micro-batch with WF and WE deferred; None takes ``memory``.
        message_bytes: Bytes of a message, or a function of the message.
        typical_message: Mean bytes of a message, for the search of an order.
        chunks: Stages per rank, or "auto" where ``costs`` are those of one rank's share.
        activation: What the stages keep between phases; empty for what unfolded schedules take too.
    """

    costs: Costs
    deferred: Costs | None = None
    memory: Memory | None = None
    deferred_memory: Memory | None = None
    message_bytes: float | Callable[[Message], float] = 0.0
    typical_message: float = 0.0
    chunks: int | Auto = "auto"
    activation: str = ""

    def costs_of(self, name: str) -> Costs:
        """Returns the costs that a schedule of this name runs with."""
        return self.deferred if self.deferred is not None and name in DEFERRED else self.costs

    def memory_of(self, name: str) -> Memory | None:
        """Returns the bytes that a micro-batch holds with a schedule of this name."""
        return self.deferred_memory if self.deferred_memory is not None and name in DEFERRED else self.memory


@dataclass(frozen=True)
class PlanOptions:
    """Holds the options that all schedules of a plan share; :func:`plan_costs` explains most of them.

    Attributes:
        level: What the ranks that hold the same stages share.
        num_sharing: The number of these ranks, D·G.
        parameters: Bytes of the parameters of the largest rank; 0 if the state does not count for the memory limit.
        accumulates: Whether an optimizer step has several batches, whose gradients are kept a second time.
    """

    num_ranks: int
    num_microbatches: int
    wave_size: int | Auto = "auto"
    max_live: int | None = None
    memory_limit: float | None = None
    latency: float = 0.0
    bandwidth: float = math.inf
    level: ShardLevel = "none"
    num_sharing: int = 1
    parameters: float = 0.0
    accumulates: bool = False

    @property
    def share(self) -> StateShare:
        """Returns what the state of the largest rank takes, with Adam."""
        return state_share(self.level, self.num_sharing, self.parameters, 2 * self.parameters, self.accumulates)


@dataclass(frozen=True)
class ScheduleRow:
    """Holds the prediction for one schedule.

    Attributes:
        name: Name of the schedule.
        schedule: Its actions; made without the memory limit where it cannot keep within it.
        report: Its simulated step.
        bound: Seconds that no folded schedule of these stages can beat; None for an unfolded schedule.
        message_bytes: Bytes sent between ranks in a step.
        fits: Whether it keeps within the memory limit.
        needed: Bytes that a rank needs at least, where it does not fit.
        activation: What its stages keep between phases; empty where there was no choice.
        after: Seconds of summing gradients, or gathering parameters, after the phases.
    """

    name: str
    schedule: Schedule
    report: Report
    bound: float | None
    message_bytes: float
    fits: bool = True
    needed: float | None = None
    activation: str = ""
    after: float = 0.0

    @property
    def step_time(self) -> float:
        """Returns the seconds of a training step, without loading data and the optimizer."""
        return self.report.makespan + self.after

    @property
    def over_ideal(self) -> float:
        """Returns the ratio of the step time to the time that the busiest rank works: 1 where it never waits."""
        return self.report.makespan / self.report.ideal

    @property
    def gap(self) -> float | None:
        """Returns the excess of the step time over the lower bound, as a share of the bound."""
        return None if self.bound is None else max(0.0, self.report.makespan / self.bound - 1.0)

    @property
    def num_live(self) -> int:
        """Returns the largest number of live micro-batches on a rank."""
        return max(self.report.peak_live)

    @property
    def peak_memory(self) -> float | None:
        """Returns the most bytes that the micro-batches of a rank hold at once, or None where bytes are not known."""
        return max(self.report.peak_memory, default=None)

    @property
    def num_messages(self) -> int:
        """Returns the number of messages between ranks in a step."""
        return sum(map(len, self.schedule.messages().values()))


@dataclass(frozen=True)
class SchedulePlan:
    """Holds the predictions for all wanted schedules, for the same work.

    Attributes:
        options: Ranks, micro-batches and limits.
        rows: One row per schedule, in the given order.
        one_rank: Seconds of a step's whole work, one phase after the other.
        busiest: The largest share of the work that a rank has, with one stage on each; 1/P where all are equal.
        failed: By name, the reason why a schedule cannot be built.
        baseline: Seconds of a step with ``1f1b-2nd``; None where it cannot be built.
        structures: Structures in a micro-batch; None where there is no data.
        atoms: Atoms in a micro-batch; None where there is no data.
        uncertainty: Share by which the measured times may be off; 0 for times that were given.
    """

    options: PlanOptions
    rows: tuple[ScheduleRow, ...]
    one_rank: float
    busiest: float
    failed: dict[str, str] = field(default_factory=dict)
    baseline: float | None = None
    structures: float | None = None
    atoms: float | None = None
    uncertainty: float = 0.0

    @property
    def choice(self) -> ScheduleRow | None:
        """Returns the fastest schedule that fits in memory; among equally fast ones, the one with the fewest bytes."""
        fitting = [row for row in self.rows if row.fits]
        least = min((row.step_time for row in fitting), default=0.0)
        fastest = [row for row in fitting if row.step_time <= least * (1 + _ROUNDING)]
        return min(fastest, key=lambda row: row.peak_memory or 0.0, default=None)

    @property
    def rivals(self) -> list[ScheduleRow]:
        """Returns the schedules that fit and that the measurement cannot tell from the choice, the fastest first."""
        chosen = self.choice
        if chosen is None:
            return []
        most = chosen.step_time * (1 + self.uncertainty)
        found = [row for row in self.rows if row.fits and row is not chosen and row.step_time <= most]
        return sorted(found, key=lambda row: row.step_time) if self.uncertainty else []

    def speed(self, row: ScheduleRow) -> float | None:
        """Returns how many times faster a schedule is than ``1f1b-2nd``."""
        return None if self.baseline is None else self.baseline / row.step_time

    def speed_up(self, row: ScheduleRow) -> float | None:
        """Returns how many times faster a schedule is than one rank with the same work.

        It is None where that is more than the number of ranks: only unequal measurements of the same work give that.
        """
        found = self.one_rank / row.step_time
        return found if found <= self.options.num_ranks * (1 + _ROUNDING) else None

    def per_second(self, number: float, row: ScheduleRow) -> float:
        """Returns the rate per second of training of something that every micro-batch has, such as its atoms."""
        return number * self.options.num_microbatches / row.step_time

    def reason(self) -> str:
        """Says in one sentence which schedule is chosen, and why."""
        chosen, limit = self.choice, self.options.memory_limit
        if chosen is None:
            least = min((row.needed for row in self.rows if row.needed is not None), default=None)
            needs = "" if least is None else f": the least that one needs is {format_bytes(least)} on a rank"
            within = "" if limit is None else f" in {format_bytes(limit)}"
            return f"No schedule fits{within}{needs}. Make micro-batches smaller, or take more ranks."
        if self.rivals:
            slowest = 100 * (self.rivals[-1].step_time / chosen.step_time - 1)
            names = ", ".join(row.name for row in (chosen, *self.rivals))
            return (
                f"{names} cannot be told apart: they differ by {slowest:.1f} % at most, and times are measured to "
                f"{100 * self.uncertainty:.1f} %. Measure on an idle machine, or with more --repeats."
            )
        others = sorted((r for r in self.rows if r is not chosen), key=lambda row: row.step_time)
        text = f"{chosen.name}: {chosen.over_ideal:.2f} of the ideal time"
        fitting = [row for row in others if row.fits]
        if fitting:
            slower = 100 * (fitting[0].step_time / chosen.step_time - 1)
            longer = "is as fast" if slower < 0.5 else f"takes {slower:.0f} % longer"
            text += f"; the next best, {fitting[0].name}, has {fitting[0].over_ideal:.2f} and {longer}"
        faster = [row for row in others if not row.fits and row.step_time < chosen.step_time]
        if faster and limit is not None:
            gain = 100 * (1 - faster[0].step_time / chosen.step_time)
            text += (
                f". {faster[0].name} would take {gain:.0f} % less, but needs {format_bytes(faster[0].needed or 0.0)} "
                f"on a rank, more than {format_bytes(limit)}"
            )
        ranks, speed_up = self.options.num_ranks, self.speed_up(chosen)
        if speed_up is None:
            return f"{text}. The measurement is too noisy to tell how much faster {ranks} ranks are than one."
        return f"{text}. {ranks} ranks are {speed_up:.1f} times as fast as one."

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, in seconds and bytes, for JSON."""
        chosen = self.choice
        return {
            "num_ranks": self.options.num_ranks,
            "num_microbatches": self.options.num_microbatches,
            "wave_size": self.options.wave_size,
            "max_live": self.options.max_live,
            "memory_limit": self.options.memory_limit,
            "latency": self.options.latency,
            "shard": self.options.level,
            "num_sharing": self.options.num_sharing,
            "state": self.options.share.in_phases,
            "bandwidth": self.options.bandwidth if math.isfinite(self.options.bandwidth) else None,
            "structures_per_microbatch": self.structures,
            "atoms_per_microbatch": self.atoms,
            "one_rank": self.one_rank,
            "busiest_share": self.busiest,
            "choice": None if chosen is None else chosen.name,
            "uncertainty": self.uncertainty,
            "rivals": [row.name for row in self.rivals],
            "reason": self.reason(),
            "schedules": [self._row(row) for row in self.rows],
            "failed": dict(self.failed),
        }

    def _row(self, row: ScheduleRow) -> dict[str, Any]:
        structures, atoms = self.structures, self.atoms
        return {
            "name": row.name,
            "num_stages": row.schedule.num_stages,
            "placement": list(row.schedule.placement),
            "force_placement": list(row.schedule.force_placement),
            "live_microbatches": list(row.report.peak_live),
            "step_time": row.step_time,
            "ideal": row.report.ideal,
            "over_ideal": row.over_ideal,
            "bound": row.bound,
            "gap": row.gap,
            "bubble_fraction": row.report.bubble_fraction,
            "microbatches_per_second": self.per_second(1, row),
            "structures_per_second": None if structures is None else self.per_second(structures, row),
            "atoms_per_second": None if atoms is None else self.per_second(atoms, row),
            "peak_memory": list(row.report.peak_memory),
            "messages": row.num_messages,
            "message_bytes": row.message_bytes,
            "speed": self.speed(row),
            "speed_over_one_rank": self.speed_up(row),
            "fits": row.fits,
            "needed_memory": row.needed,
            "activation": row.activation or None,
        }


def plan_costs(
    costs: Costs,
    num_ranks: int,
    num_microbatches: int,
    *,
    schedules: Sequence[str] = tuple(GENERATORS),
    memory: Memory | None = None,
    memory_limit: float | None = None,
    wave_size: int | Auto = "auto",
    max_live: int | None = None,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    message_bytes: float = 0.0,
) -> SchedulePlan:
    """Compares schedules for given costs.

    Args:
        costs: Seconds of the phases of one rank's share for one micro-batch, or one entry per rank.
        num_ranks: Number P of pipeline ranks.
        num_microbatches: Number M of micro-batches of a training step.
        schedules: Names of schedules.
        memory: Bytes that a micro-batch holds between its phases, given like ``costs``.
        memory_limit: Most bytes that the micro-batches of one rank may hold.
        wave_size: Micro-batches per wave of ``wavek`` and ``wavek-zb``, or "auto".
        max_live: Most live micro-batches of a rank.
        latency: Seconds of a message.
        bandwidth: Bytes per second of messages in each direction between two ranks.
        message_bytes: Bytes of a message.

    Raises:
        ValueError: A name is unknown, or a number is out of its range.
    """
    options = PlanOptions(num_ranks, num_microbatches, wave_size, max_live, memory_limit, latency, bandwidth)
    stages = CutCosts(costs, memory=memory, message_bytes=message_bytes, typical_message=message_bytes)
    return plan_cuts([stages], options, schedules)


def plan_cuts(
    choices: Sequence[CutCosts],
    options: PlanOptions,
    schedules: Sequence[str] = tuple(GENERATORS),
    *,
    structures: float | None = None,
    atoms: float | None = None,
) -> SchedulePlan:
    """Compares schedules for a potential that is cut in one or more ways.

    Args:
        choices: The cuts, the one with a single stage on each rank first. Schedules that can have several stages on a
            rank take the cut with the shortest step, and folded schedules the activation with the shortest step that
            fits.
        options: Ranks, micro-batches and limits.
        schedules: Names of schedules.
        structures: Structures in a micro-batch, for the throughput.
        atoms: Atoms in a micro-batch.

    Raises:
        ValueError: A name is unknown, or a number is out of its range.
    """
    limit = options.memory_limit
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"memory_limit is {limit!r}, expected a number of bytes > 0.")
    if limit is not None and any(stages.memory is None for stages in choices):
        raise ValueError("memory_limit needs memory: give the bytes that a micro-batch holds between its phases.")
    Link(options.latency, options.bandwidth)
    # A number that no schedule accepts is the user's mistake; a limit that some cannot keep is a result.
    build_schedule(
        "wavek",
        options.num_ranks,
        options.num_microbatches,
        PhaseCosts(1, 1, 1, 1),
        wave_size=options.wave_size,
        latency=options.latency,
    )
    for name in schedules:
        if name not in GENERATORS:
            build_schedule(name, 1, 1, PhaseCosts(1, 1, 1, 1))  # raises an error with the nearest name
    rows: list[ScheduleRow] = []
    failed: dict[str, str] = {}
    for name in dict.fromkeys(schedules):
        try:
            rows.append(_row(name, choices, options))
        except ValueError as error:
            failed[name] = str(error)
    baseline = next((row.step_time for row in rows if row.name == BASELINE), None)
    if baseline is None and BASELINE not in failed:
        try:
            baseline = _row(BASELINE, choices, options).step_time
        except ValueError:
            baseline = None
    shares = [entry.fused().total for entry in costs_per_stage(choices[0].costs, options.num_ranks, options.num_ranks)]
    one_rank = options.num_microbatches * sum(shares)
    return SchedulePlan(options, tuple(rows), one_rank, max(shares) / sum(shares), failed, baseline, structures, atoms)


def best_plan(plans: Sequence[SchedulePlan]) -> SchedulePlan:
    """Returns the plan with the level of sharing that training takes.

    Args:
        plans: One for each level, the one that shares least first. If none fits, the last one is returned.
    """
    fitting = {plan.options.level: plan for plan in plans if plan.choice is not None}
    times = {level: plan.choice.step_time for level, plan in fitting.items() if plan.choice is not None}
    return fitting[fastest_level(times)] if times else plans[-1]


def _row(name: str, choices: Sequence[CutCosts], options: PlanOptions) -> ScheduleRow:
    """Returns the prediction for one schedule with the best cut; ValueError where it cannot be built at all."""
    best: ScheduleRow | None = None
    for stages in _choices_of(name, choices):
        found = _row_of_stages(name, stages, options)
        if best is None or (found.fits, best.step_time * (1 - _LEAST_GAIN)) > (best.fits, found.step_time):
            best = found
    assert best is not None
    return best


def _choices_of(name: str, choices: Sequence[CutCosts]) -> list[CutCosts]:
    """Returns the cuts and activations that a schedule may have; unfolded schedules keep everything."""
    found = [c for c in choices if name in SEVERAL_STAGES or c.chunks == choices[0].chunks]
    folded = [c for c in found if c.activation] if name not in UNFOLDED else []
    return folded or [c for c in found if not c.activation]


def _row_of_stages(name: str, stages: CutCosts, options: PlanOptions) -> ScheduleRow:
    costs, memory, limit = stages.costs_of(name), stages.memory_of(name), options.memory_limit
    latency = options.latency + stages.typical_message / options.bandwidth

    def build(within: float | None, max_live: int | None) -> Schedule:
        return build_schedule(
            name,
            options.num_ranks,
            options.num_microbatches,
            costs,
            wave_size=options.wave_size if max_live == options.max_live else "auto",
            max_live=max_live,
            chunks=stages.chunks,
            latency=latency,
            memory=None if within is None else memory,
            memory_limit=within,
            reserved=0.0 if within is None else options.share.in_phases,
        )

    def peak(schedule: Schedule) -> float:
        return max(simulate(schedule, costs, memory=memory).peak_memory) + options.share.in_phases

    needed = None
    try:
        schedule = build(limit, options.max_live)
    except ValueError:
        if limit is None:
            raise
        schedule = build(None, options.max_live)
        # The searched schedules go down to one micro-batch at a time; the others have one order only.
        needed = peak(build(None, 1) if name in SEARCHED else schedule)
    sent = [
        stages.message_bytes(message) if callable(stages.message_bytes) else stages.message_bytes
        for messages in schedule.messages().values()
        for message in messages
    ]
    total = float(sum(sent))
    link = Link(options.latency, options.bandwidth, total / max(len(sent), 1))
    messages = StateCosts.of(options.num_sharing, options.parameters, Link(options.latency, options.bandwidth))
    state = StateCosts(messages.gather, messages.reduce)  # its bytes are not those of micro-batches
    changed = with_state_changes(schedule, options.level)
    report = simulate(changed, costs, comm=link, memory=memory, state=state)
    bound = None
    if schedule.is_folded:
        per_stage = costs_per_stage(costs, schedule.num_ranks, schedule.num_stages)
        deferred = name in DEFERRED
        bound = lower_bound(
            per_stage, schedule.placement, schedule.num_microbatches, deferred=deferred, latency=options.latency
        )
    after = seconds_after_phases(schedule, options.level, state)
    return ScheduleRow(name, changed, report, bound, total, needed is None, needed, stages.activation, after)
