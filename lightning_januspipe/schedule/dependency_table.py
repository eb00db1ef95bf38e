"""Tabulates the dependencies between the phases of all stages, which are the same for every micro-batch.

Large schedules have tens of thousands of actions. Simulation and validation look their dependencies up here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_januspipe.schedule.actions import Action, Phase, Schedule


@dataclass
class StagePhase:
    """Holds the dependencies of one phase of one stage, for any micro-batch. Each dependency has an index.

    Args:
        rank: The rank that runs the phase.
        local_inputs: Dependencies on phases of the same rank.
        receives: Messages that the phase waits for, as source rank and dependency, its predecessor's first.
        local_outputs: Dependencies of phases of the same rank on this one.
        sends: Messages in the order in which they are sent, as target rank and dependency.
    """

    rank: int
    local_inputs: list[int] = field(default_factory=list)
    receives: list[tuple[int, int]] = field(default_factory=list)
    local_outputs: list[int] = field(default_factory=list)
    sends: list[tuple[int, int]] = field(default_factory=list)

    @property
    def needs(self) -> list[int]:
        """Returns all dependencies that the phase waits for."""
        return [*self.local_inputs, *(index for _, index in self.receives)]


def dependency_table(schedule: Schedule) -> tuple[dict[Phase, list[StagePhase]], int]:
    """Returns the phases of all stages, by phase and stage, and the number of dependencies between them."""
    actions = [Action(phase, stage, 0) for phase in Phase for stage in range(schedule.num_stages)]
    entries = {action: StagePhase(schedule.rank_of(action)) for action in actions}
    indices: dict[tuple[Action, Action], int] = {}
    for target, entry in entries.items():
        for source in schedule.dependencies(target):
            index = indices[source, target] = len(indices)
            if entries[source].rank == entry.rank:
                entry.local_inputs.append(index)
                entries[source].local_outputs.append(index)
            else:
                entry.receives.append((entries[source].rank, index))
    for source, entry in entries.items():
        entry.sends = [(entries[target].rank, indices[source, target]) for _, target in schedule.sent(source)]
    by_phase = {phase: [entries[Action(phase, s, 0)] for s in range(schedule.num_stages)] for phase in Phase}
    return by_phase, len(indices)
