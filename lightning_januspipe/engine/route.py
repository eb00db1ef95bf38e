"""What one rank has to know of a schedule to run its part."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import DEFERRED_PHASES, Action, Message, Phase, Schedule


class Route:
    """A schedule as one rank sees it.

    Args:
        schedule: the actions of all ranks.
        rank: this rank.

    Attributes:
        order: this rank's actions.
        incoming: for every rank that sends to this one, its messages in the order in which it sends them.
        is_deferred: whether WF and WE are actions of their own.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._schedule, self._rank = schedule, rank
        self.order = schedule.actions[rank]
        self.is_deferred = not schedule.phases.isdisjoint(DEFERRED_PHASES)
        self.incoming: dict[int, list[Message]] = {}
        self._positions: dict[Action, int] = {}
        self._inputs: dict[Action, list[Message]] = {action: [] for action in self.order}
        peers: set[int] = set()
        for (source, target), messages in schedule.messages().items():
            if target == rank:
                self.incoming[source] = messages
                peers.add(source)
            elif source == rank:
                peers.add(target)
        self._numbers = {message: i for messages in self.incoming.values() for i, message in enumerate(messages)}
        for peer in peers:
            self._positions.update((action, i) for i, action in enumerate(schedule.actions[peer]))
        for action in self.order:
            for message in self._all_inputs(action):
                self._inputs[action].append(message)

    def _all_inputs(self, action: Action) -> list[Message]:
        """Messages and what is handed on within the rank."""
        needed = [d for d in self._schedule.dependencies(action) if d.phase not in DEFERRED_PHASES]
        found = []
        for source in needed:
            if source.phase is action.phase or self.is_split(action.stage):
                handed_on = source.phase is action.phase or action.phase in (Phase.FF, Phase.BE)
            else:
                # Folded: the stage keeps what its own next phase needs, but for the observables at the first fold.
                handed_on = action.phase is Phase.FF and action.stage == self.num_stages - 1
            if handed_on:
                found.append(Message(source, action))
        return found

    @property
    def num_stages(self) -> int:
        """Length of the chain."""
        return self._schedule.num_stages

    def is_split(self, stage: int) -> bool:
        """Whether FF and BF of a stage are on another rank than FE and BE."""
        return self._schedule.is_split(stage)

    def rank_of(self, action: Action) -> int:
        """The rank that runs an action."""
        return self._schedule.rank_of(action)

    def inputs(self, action: Action) -> list[Message]:
        """What an action of this rank takes in, from other ranks or from this one."""
        return self._inputs[action]

    def number(self, message: Message) -> int:
        """The place of a message among those from its sender, from 0 on."""
        return self._numbers[message]

    def position(self, action: Action) -> int:
        """The place of another rank's action in its order."""
        return self._positions[action]


def evaluation_schedule(
    placement: tuple[int, ...], force_placement: tuple[int, ...], num_ranks: int, num_microbatches: int
) -> Schedule:
    """FE and FF of all stages, one micro-batch after the other.

    Args:
        placement: the rank of FE of each stage.
        force_placement: the rank of FF of each stage.
        num_ranks: ranks of the pipeline.
        num_microbatches: how many micro-batches.
    """
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    for microbatch in range(num_microbatches):
        for stage, rank in enumerate(placement):
            orders[rank].append(Action(Phase.FE, stage, microbatch))
        for stage, rank in reversed(list(enumerate(force_placement))):
            orders[rank].append(Action(Phase.FF, stage, microbatch))
    actions = tuple(map(tuple, orders))
    return Schedule("evaluation", num_ranks, num_microbatches, actions, placement, force_placement)
