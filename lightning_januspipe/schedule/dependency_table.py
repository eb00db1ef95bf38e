"""What the actions of a schedule wait for and hand on, once for every phase of every stage.

It is the same for all micro-batches, and large schedules have tens of thousands of actions: what goes through all of
them looks it up here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_januspipe.schedule.actions import Action, Phase, Schedule


@dataclass
class StagePhase:
    """One phase of one stage, for any micro-batch. An *edge* is the number of a dependency between two steps.

    Args:
        rank: The rank that runs it.
        takes: Edges from steps of the same rank.
        receives: Messages from other ranks that it waits for, as source rank and edge, along the chain first.
        hands_on: Edges to steps of the same rank.
        sends: Messages to other ranks in the order in which they are sent, as target rank and edge.
    """

    rank: int
    takes: list[int] = field(default_factory=list)
    receives: list[tuple[int, int]] = field(default_factory=list)
    hands_on: list[int] = field(default_factory=list)
    sends: list[tuple[int, int]] = field(default_factory=list)

    @property
    def needs(self) -> list[int]:
        """All edges that it waits for."""
        return [*self.takes, *(edge for _, edge in self.receives)]


def dependency_table(schedule: Schedule) -> tuple[dict[Phase, list[StagePhase]], int]:
    """The steps of a schedule by phase and stage, and the number of edges."""
    actions = [Action(phase, stage, 0) for phase in Phase for stage in range(schedule.num_stages)]
    steps = {action: StagePhase(schedule.rank_of(action)) for action in actions}
    edges: dict[tuple[Action, Action], int] = {}
    for target, step in steps.items():
        for source in schedule.dependencies(target):
            edge = edges[source, target] = len(edges)
            if steps[source].rank == step.rank:
                step.takes.append(edge)
                steps[source].hands_on.append(edge)
            else:
                step.receives.append((steps[source].rank, edge))
    for source, step in steps.items():
        step.sends = [(steps[target].rank, edges[source, target]) for _, target in schedule.sent(source)]
    by_phase = {phase: [steps[Action(phase, s, 0)] for s in range(schedule.num_stages)] for phase in Phase}
    return by_phase, len(edges)
