"""Puts the changes of sharded state into schedules, and validates them.

The ranks that hold a stage (its replicas and graph ranks) may each keep a shard of its state. Then the step has

- ``UNSHARD``: the gathering of the stage's parameters starts. It runs beside other work, and the first phase of the
  stage waits for it.
- ``RESHARD``: the gathered parameters are released.
- ``REDUCE``: the summing of the stage's gradients starts, of which each rank gets its shard. It runs beside other work
  too, and the rank's optimizer step waits for it.

These ranks meet in them, although they may run schedules for different numbers of micro-batches. So their order must
not depend on this number: a rank gathers its stages in their order, all at the start of the step, and reduces them in
the reverse order, in which the gradients of most schedules are complete.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lightning_januspipe.schedule.actions import STATE_CHANGES, WHOLE_STEP, Action, Phase, Schedule
from lightning_januspipe.schedule.costs import State, state_per_stage

ShardLevel = Literal["none", "optimizer", "parameters"]
"""What the ranks that hold a stage share: nothing, its optimizer state and reduced gradients, or its parameters too."""

_GRADIENT_PHASES = (Phase.BF, Phase.BE, Phase.WF, Phase.WE)


def with_state_changes(schedule: Schedule, level: ShardLevel, *, reduces: bool = True) -> Schedule:
    """Returns a schedule with the changes of sharded state.

    Parameters of split stages are on two ranks of the pipeline, and stay whole there.

    Args:
        schedule: The phases of all micro-batches.
        level: What is shared.
        reduces: Whether the optimizer steps after this step. If not, because gradients are accumulated, they are not
            reduced, and parameters are not released.
    """
    if level == "none":
        return schedule
    orders = []
    for order in schedule.actions:
        stages = sorted({action.stage for action in order})
        whole = [stage for stage in stages if not schedule.is_split(stage)]
        after: dict[int, list[Action]] = {}
        if reduces:
            last = {action.stage: index for index, action in enumerate(order)}
            if level == "parameters":  # memory is free before a reduction takes some
                after.update({last[stage]: [Action(Phase.RESHARD, stage, WHOLE_STEP)] for stage in whole})
            position = 0
            for stage in reversed(whole):
                position = max(position, last[stage])
                after.setdefault(position, []).append(Action(Phase.REDUCE, stage, WHOLE_STEP))
        found = [Action(Phase.UNSHARD, stage, WHOLE_STEP) for stage in whole] if level == "parameters" else []
        for index, action in enumerate(order):
            found += [action, *after.get(index, ())]
        orders.append(tuple(found))
    return replace(schedule, actions=tuple(orders))


def seconds_after_phases(schedule: Schedule, level: ShardLevel, state: State) -> float:
    """Returns the time of collectives that no phase hides, because they follow all of them.

    Without shards gradients are summed after the step. With optimizer state in shards, updated parameters are gathered
    after the optimizer's step; parameters in shards are gathered in the next step.

    Args:
        schedule: The phases of all micro-batches.
        level: What the ranks that hold a stage share.
        state: Costs of the stages' reductions and gatherings, as :func:`.simulate` takes them.
    """
    if level == "parameters":
        return 0.0
    after = [0.0] * schedule.num_ranks
    of_stages = state_per_stage(state, schedule.num_ranks, schedule.num_stages)
    for rank, costs in zip(schedule.placement, of_stages, strict=True):
        after[rank] += costs.gather + (costs.reduce if level == "none" else 0.0)
    return max(after)


def mistake_in_state(schedule: Schedule) -> tuple[str, int, int] | None:
    """Returns the first mistake in the changes of sharded state: in words, its rank, and the index of its action."""
    reduces = any(action.phase is Phase.REDUCE for order in schedule.actions for action in order)
    for rank in range(schedule.num_ranks):
        found = _Walk(schedule, rank).mistake(reduces)
        if found is not None:
            return found[0], rank, found[1]
    return None


class _Walk:
    """Follows the state of the stages of one rank through its actions."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._schedule, self._order, self._rank = schedule, schedule.actions[rank], rank
        changed = [a for a in self._order if a.phase in (Phase.UNSHARD, Phase.RESHARD)]
        self._sharded = {action.stage for action in changed}
        self._gathered: list[int] = []
        self._present: set[int] = set()
        self._reduced: list[int] = []

    def mistake(self, reduces: bool) -> tuple[str, int] | None:
        """Returns a mistake with the index of its action, None if there is none."""
        for index, action in enumerate(self._order):
            what = self._change(action) if action.phase in STATE_CHANGES else self._phase(action)
            if what:
                return f"{action} on rank {self._rank} {what}.", index
        stages = {action.stage for action in self._order}
        missing = [s for s in stages if reduces and s not in self._reduced and not self._schedule.is_split(s)]
        if missing:
            last = max(i for i, action in enumerate(self._order) if action.stage == missing[0])
            return f"no REDUCE{missing[0]} follows {self._order[last]} on rank {self._rank}.", last
        return None

    def _phase(self, action: Action) -> str:
        stage = action.stage
        if stage in self._sharded and stage not in self._present:
            state = "were released before" if stage in self._gathered else "are not gathered before"
            return f"computes with parameters that are not there: those of stage {stage} {state}"
        if stage in self._reduced and action.phase in _GRADIENT_PHASES:
            return f"adds to gradients that REDUCE{stage} has reduced before"
        return ""

    def _change(self, action: Action) -> str:
        stage = action.stage
        if self._schedule.is_split(stage):
            return f"changes the state of stage {stage}, which is split over two ranks and stays whole"
        if action.phase is Phase.RESHARD:
            if stage not in self._present:
                return "releases parameters that are not there"
            self._present.remove(stage)
        elif action.phase is Phase.UNSHARD:
            if stage in self._gathered:
                return "gathers parameters for the second time in a step"
            if self._reduced or (self._gathered and self._gathered[-1] > stage):
                return "is out of order: stages are gathered in their order, before any is reduced"
            self._gathered.append(stage)
            self._present.add(stage)
        elif self._reduced and self._reduced[-1] <= stage:
            return "is out of order: stages are reduced once, and in the reverse order"
        else:
            self._reduced.append(stage)
        return ""
