"""Derives one rank's part of a schedule, and the schedule of an evaluation."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import Action, Message, Phase, Schedule, predecessor, successor


class Route:
    """Knows what one rank takes in and hands on in a schedule, and in which order others send to it.

    Args:
        schedule: The actions of all ranks.
        rank: This rank.

    Attributes:
        order: This rank's actions.
        num_stages: Length of the chain.
        incoming: For every rank that sends to this one, its messages in the order in which it sends them.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._schedule, self._rank = schedule, rank
        self.order = schedule.actions[rank]
        self.num_stages = schedule.num_stages
        self.incoming: dict[int, list[Message]] = {}
        peers: set[int] = set()
        for (source, target), messages in schedule.messages().items():
            if target == rank:
                self.incoming[source] = messages
                peers.add(source)
            elif source == rank:
                peers.add(target)
        self._indices = {message: i for messages in self.incoming.values() for i, message in enumerate(messages)}
        self._positions = {action: i for peer in peers for i, action in enumerate(schedule.actions[peer])}
        phases = [action for action in self.order if not action.changes_state]
        self._inputs = {action: self._all_inputs(action) for action in phases}
        self._outputs = {action: self._all_outputs(action) for action in phases}

    def _all_inputs(self, action: Action) -> tuple[Message, ...]:
        before = predecessor(action, self.num_stages)
        received = self._schedule.received(action)
        return received if before is None else received + self._handed_on(Message(before, action))

    def _all_outputs(self, action: Action) -> tuple[Message, ...]:
        after = successor(action, self.num_stages)
        sent = self._schedule.sent(action)
        return sent if after is None else sent + self._handed_on(Message(action, after))

    def _handed_on(self, message: Message) -> tuple[Message, ...]:
        """Returns the message itself, if its tensors stay on this rank.

        A stage keeps what its own next phase needs, but for the observables, which the last stage's FF takes from FE.
        """
        source, target = message
        is_here = self.rank_of(source) == self.rank_of(target) == self._rank
        return (message,) if is_here and (source.phase is target.phase or target.phase is Phase.FF) else ()

    def rank_of(self, action: Action) -> int:
        """Returns the rank that runs an action."""
        return self._schedule.rank_of(action)

    def inputs(self, action: Action) -> tuple[Message, ...]:
        """Returns what an action of this rank takes in, from other ranks or from this one."""
        return self._inputs[action]

    def outputs(self, action: Action) -> tuple[Message, ...]:
        """Returns what an action of this rank hands on, to other ranks or to this one."""
        return self._outputs[action]

    def index(self, message: Message) -> int:
        """Returns the index of a message among all messages from its sender to this rank."""
        return self._indices[message]

    def position(self, action: Action) -> int:
        """Returns the index of another rank's action in that rank's order."""
        return self._positions[action]


def evaluation_schedule(
    placement: tuple[int, ...], force_placement: tuple[int, ...], num_ranks: int, num_microbatches: int
) -> Schedule:
    """Returns FE and FF of all stages, one micro-batch after the other.

    Args:
        placement: The rank of FE of each stage.
        force_placement: The rank of FF of each stage.
        num_ranks: Ranks of the pipeline.
        num_microbatches: How many micro-batches.
    """
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    for microbatch in range(num_microbatches):
        for stage, rank in enumerate(placement):
            orders[rank].append(Action(Phase.FE, stage, microbatch))
        for stage, rank in reversed(list(enumerate(force_placement))):
            orders[rank].append(Action(Phase.FF, stage, microbatch))
    actions = tuple(map(tuple, orders))
    return Schedule("evaluation", num_ranks, num_microbatches, actions, placement, force_placement)
