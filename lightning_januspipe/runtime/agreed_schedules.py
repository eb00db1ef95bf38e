"""Builds the schedules of one pipeline on one rank, the same for all ranks, and plans them anew from measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_januspipe.distributed import on_first_rank, waiting
from lightning_januspipe.engine.timeline import MeanPhaseTimes, Span
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.planner import Planner, is_searched, measured_costs
from lightning_januspipe.schedule import PhaseCosts, Report, Schedule, validate_schedule
from lightning_januspipe.schedule.state_actions import ShardLevel, with_state_changes

_Result = TypeVar("_Result")

_MEASURED_STEPS = (1, 2, 3)
"""Costs are measured in these training steps; step 0 warms up."""


class AgreedSchedules:
    """Gives every rank of a pipeline the same schedules, whatever each rank has measured.

    The stages stay on the ranks where the first schedule puts them. After the first training steps the order of the
    actions is searched again, with the times that the phases and the user's loss took on these ranks.

    Args:
        planner: Builds schedules; the planner of the pipeline's first rank decides.
        mesh: This rank's process groups.
        num_microbatches: Micro-batches of most steps; the ranks of the stages are chosen for them.

    Attributes:
        first: The schedule for ``num_microbatches`` with the costs of the start.
        planner: Builds schedules from the costs known now.
        costs: Times of the phases of each stage, in seconds, as they are known now.
        before_meeting: Called in a step before all ranks of the mesh have to meet in it.
    """

    def __init__(self, planner: Planner, mesh: Mesh, num_microbatches: int) -> None:
        self._mesh, self.planner = mesh, planner
        self.costs: tuple[PhaseCosts, ...] = planner.costs
        self.first = self._agreed(lambda: planner.schedule(num_microbatches))
        self._schedules = {num_microbatches: self.first}
        self._with_changes: dict[tuple[int, ShardLevel, bool], tuple[Schedule, Schedule]] = {}
        self.planner = replace(planner, placement=self.first.placement)
        self._times = MeanPhaseTimes()
        self._num_steps = 0
        self.before_meeting: Callable[[], None] = lambda: None

    def schedule(self, num_microbatches: int, level: ShardLevel = "none", reduces: bool = True) -> Schedule:
        """Returns the schedule for a number of micro-batches; all ranks of the pipeline have to ask for it.

        Args:
            num_microbatches: Micro-batches of the step.
            level: What the ranks that hold the same stages share.
            reduces: Whether the optimizer steps after the step.
        """
        schedule = self._phases(num_microbatches)
        key = num_microbatches, level, reduces
        known = self._with_changes.get(key)
        if known is None or known[0] is not schedule:
            changed = with_state_changes(schedule, level, reduces=reduces)
            if changed is not schedule:
                validate_schedule(changed)
            known = self._with_changes[key] = schedule, changed
        return known[1]

    def _phases(self, num_microbatches: int) -> Schedule:
        """Returns the phases of the schedule, without changes of sharded state."""
        if num_microbatches not in self._schedules:
            found = self._agreed(lambda: self.planner.schedule(num_microbatches))
            places = found.placement, found.force_placement
            assert places == (self.first.placement, self.first.force_placement), "stages stay on their ranks"
            self._schedules[num_microbatches] = found
        return self._schedules[num_microbatches]

    def predicted(self, schedule: Schedule, costs: tuple[PhaseCosts, ...]) -> Report:
        """Simulates a schedule with given costs, in seconds and bytes."""
        return replace(self.planner, costs=costs).report(schedule)

    @property
    def is_measuring(self) -> bool:
        """Tells whether the times of the next training step are needed."""
        return self._num_steps in _MEASURED_STEPS

    def measure_again(self) -> None:
        """Measures the times of the phases anew, in the next steps: something else runs them from now on."""
        self._times, self._num_steps = MeanPhaseTimes(), 0

    def step_ran(self, schedule: Schedule, spans: Sequence[Span]) -> None:
        """Takes in a training step; after the last measured step, plans for the times that were measured.

        Args:
            schedule: What ran.
            spans: The actions of this rank with their times, if :attr:`is_measuring`.
        """
        self._times.add(spans)
        if self._num_steps == _MEASURED_STEPS[-1]:
            self._plan_anew(self._schedules[schedule.num_microbatches], self._times)
        self._num_steps += 1

    def plan_for(self, spans: Sequence[Span]) -> None:
        """Plans for the times of what has run before training; all ranks of the mesh have to call it.

        Args:
            spans: The actions of this rank.
        """
        times = MeanPhaseTimes()
        times.add(spans)
        self._plan_anew(self.first, times)

    def _plan_anew(self, schedule: Schedule, times: MeanPhaseTimes) -> None:
        """Schedules without a search keep the costs of the start, which have placed their stages."""
        self.before_meeting()
        of_ranks = self._mesh.gathered_over_pipeline(times.means(), "exchange of measured times")
        means = {key: time for of_rank in of_ranks for key, time in of_rank.items()}
        self.costs = costs = self._of_first_replica(measured_costs(means, schedule))
        if is_searched(self.planner.name):
            better = self._agreed(lambda: self.planner.improved(schedule, costs))
            self._schedules = {schedule.num_microbatches: better or schedule}
            self.planner = replace(self.planner, costs=costs)

    def _of_first_replica(self, mine: _Result) -> _Result:
        """Replicas run one order, so that losses with collectives meet in the order of their micro-batches."""
        if self._mesh.shape.size == 1:
            return mine
        found = [mine]
        with waiting("agreement on a schedule", self._mesh.host_group):
            dist.broadcast_object_list(found, 0, group=self._mesh.host_group)
        return found[0]

    def _agreed(self, build: Callable[[], _Result]) -> _Result:
        """Returns what the first rank of a replica builds on every rank of the replica, or raises its error there."""
        if len(self._mesh.replica_ranks) == 1:
            return build()
        first = self._mesh.replica_ranks[0]

        def broadcast(result: Any) -> Any:
            found = [result]
            with waiting("agreement on a schedule", self._mesh.replica_group):
                dist.broadcast_object_list(found, first, group=self._mesh.replica_group)
            return found[0]

        return on_first_rank(build, self._mesh.rank - first, broadcast)
