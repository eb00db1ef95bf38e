"""Plans the schedule of a step from measured costs. The schedules themselves, free of torch, are in ``schedule/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lightning_januspipe.engine.single_process import SHORTEST
from lightning_januspipe.schedule import (
    MemoryCosts,
    Phase,
    PhaseCosts,
    Report,
    Schedule,
    StateCosts,
    build_schedule,
    simulate,
)
from lightning_januspipe.schedule.actions import COMPUTED_PHASES
from lightning_januspipe.schedule.build_schedule import CHOOSES_PLACEMENT, DEFERRED, SEARCHED, SEVERAL_STAGES, UNFOLDED
from lightning_januspipe.schedule.stage_placement import layouts, snake
from lightning_januspipe.schedule.state_actions import ShardLevel, seconds_after_phases, with_state_changes

# Times of phases are measured to a few percent: a new order has to be better by more.
_WORTH_A_CHANGE = 0.01


@dataclass(frozen=True)
class Planner:
    """Builds the schedules of one pipeline.

    Attributes:
        name: Name of the schedule.
        num_ranks: Ranks of the pipeline.
        costs: Seconds of the phases of each stage for one micro-batch.
        memory: Bytes that one micro-batch holds in each stage.
        wave_size: Micro-batches in a wave, or "auto".
        memory_limit: Most bytes that one rank may hold, or None.
        latency: Seconds that a message takes.
        placement: The rank of each stage, once it is chosen.
        reserved: Bytes of the memory limit that micro-batches may not take: those of the state of the stages.
        level: What the ranks that hold the same stages share.
        state: Costs of the changes of each stage's state; empty if no other rank holds the stages.
    """

    name: str
    num_ranks: int
    costs: tuple[PhaseCosts, ...] = ()
    memory: tuple[MemoryCosts, ...] = ()
    wave_size: int | Literal["auto"] = "auto"
    memory_limit: float | None = None
    latency: float = 0.0
    placement: tuple[int, ...] | None = None
    reserved: float = 0.0
    level: ShardLevel = "none"
    state: tuple[StateCosts, ...] = ()

    def schedule(self, num_microbatches: int) -> Schedule:
        """Builds the schedule for a number of micro-batches.

        Raises:
            ValueError: The schedule cannot keep within the memory limit.
        """
        limited = self.memory_limit is not None
        return build_schedule(
            self.name,
            self.num_ranks,
            num_microbatches,
            self.costs,
            wave_size=self.wave_size,
            chunks=len(self.costs) // self.num_ranks,
            latency=self.latency,
            memory=self.memory if limited else None,
            memory_limit=self.memory_limit,
            placement=self.placement if self.name in CHOOSES_PLACEMENT else None,
            reserved=self.reserved,
        )

    def step_time(self, num_microbatches: int) -> float:
        """Predicts the seconds of a training step, with the reduction of gradients and without the optimizer."""
        return self._makespan(self.schedule(num_microbatches), self.costs)

    def report(self, schedule: Schedule) -> Report:
        """Simulates a schedule, in seconds and bytes."""
        return simulate(schedule, self.costs, comm=self.latency, memory=self.memory, state=self.state or None)

    def room(self, num_microbatches: int) -> tuple[float, ...]:
        """Returns the bytes that a micro-batch may keep in each stage.

        These are the planned ones, and a share of those that the limit leaves if all micro-batches are held at once.

        Args:
            num_microbatches: The micro-batches of a step.
        """
        assert self.memory_limit is not None
        planned = [memory.total for memory in self.memory]
        left = (self.memory_limit - self.reserved) / num_microbatches - sum(planned)
        return tuple(bytes + max(left, 0.0) / len(planned) for bytes in planned)

    def improved(self, schedule: Schedule, costs: tuple[PhaseCosts, ...]) -> Schedule | None:
        """Searches a schedule for other costs; returns it if it gains more than the costs are uncertain.

        Args:
            schedule: The schedule in use. It stays if the search finds none within the memory limit.
            costs: Seconds of the phases of each stage, measured anew.
        """
        try:
            found = replace(self, costs=costs).schedule(schedule.num_microbatches)
        except ValueError:
            return None
        gain = 1.0 - self._makespan(found, costs) / self._makespan(schedule, costs)
        return found if gain > _WORTH_A_CHANGE else None

    def _makespan(self, schedule: Schedule, costs: tuple[PhaseCosts, ...]) -> float:
        changed = with_state_changes(schedule, self.level)
        found = simulate(changed, costs, comm=self.latency, state=self.state or None).makespan
        return found + (seconds_after_phases(schedule, self.level, self.state) if self.state else 0.0)


def measured_costs(seconds: Mapping[tuple[int, Phase], float], schedule: Schedule) -> tuple[PhaseCosts, ...]:
    """Returns the costs of each stage from the times of phases that ran.

    Args:
        seconds: By stage and phase; WF and WE may be missing if they did not run by themselves.
        schedule: What ran. FF and BF of a split stage have computed FE and BE once more.
    """
    found = []
    for stage in range(schedule.num_stages):
        fe, ff, bf, be, wf, we = (seconds.get((stage, phase), 0.0) for phase in COMPUTED_PHASES)
        if schedule.is_split(stage):
            ff, bf = ff - fe, bf - be
        fe, ff, bf, be = (max(t, SHORTEST) for t in (fe, ff, bf, be))
        found.append(PhaseCosts(fe, ff, bf, be, wf, we))
    return tuple(found)


def placements(name: str, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns for a schedule the placements that a potential may be cut for, the simplest first.

    An unfolded schedule places its stages by their costs; here only the number of stages counts.

    Args:
        name: Name of the schedule.
        num_ranks: Ranks of the pipeline.

    Returns:
        The rank of each stage, for each placement.
    """
    found = [tuple(range(num_ranks))]
    if num_ranks > 1 and name in SEVERAL_STAGES:
        found += layouts(num_ranks, 2 * num_ranks) if name in CHOOSES_PLACEMENT else [snake(num_ranks, 2 * num_ranks)]
    return tuple(found)


def is_deferred(name: str) -> bool:
    """Returns whether a schedule has WF and WE."""
    return name in DEFERRED


def is_unfolded(name: str) -> bool:
    """Returns whether a schedule may split stages."""
    return name in UNFOLDED


def is_searched(name: str) -> bool:
    """Returns whether the order of a schedule depends on the costs."""
    return name in SEARCHED
