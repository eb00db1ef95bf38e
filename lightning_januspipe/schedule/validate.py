"""Validates that a schedule is complete, keeps its dependencies and cannot deadlock.

A valid schedule is safe with an executor that does at least this:

1. Every ordered pair of ranks has a channel of its own (a process group per direction whose sends and receives with
   different peers do not wait for each other). A channel matches sends with receives strictly in order, without
   looking at their content.
2. A rank runs its actions in order. Before an action it has posted the receives of that action's messages, and of all
   messages that their senders send before these, in the senders' order, and waits for its messages. It may post more
   receives ahead. A message that arrives early is kept.
3. After an action a rank issues the sends of the result, if there are any. A send has rendezvous semantics: it is
   complete only when the receiver has posted the receive. The rank does not wait for that (isend) and keeps the
   tensor until then.

Point 3 is as weak as it can be. If a send blocked its rank, even plain 1F1B would deadlock: in its steady state two
neighbours send to each other at the same time. So the number of unmatched sends that a channel can hold is a
parameter, ``max_pending_sends``: None for an executor that holds any number, 0 for blocking sends (``gpipe`` passes),
1 for one buffer per channel. A receive that is always posted n messages ahead counts as n buffers.

The waits must have no cycle. Waiting is monotone (an action that can start stays able to start), so running the
schedule once, in any order of ranks, decides for every timing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from lightning_januspipe.schedule.actions import (
    CRITICAL_PHASES,
    DEFERRED_PHASES,
    WHOLE_STEP,
    Action,
    Schedule,
)
from lightning_januspipe.schedule.dependency_table import dependency_table
from lightning_januspipe.schedule.render import render
from lightning_januspipe.schedule.state_actions import mistake_in_state

_GRID_COLUMNS = 15  # of the schedule that an error shows, around the failing action


class ScheduleError(ValueError):
    """Reports a schedule that cannot run.

    Args:
        message: The mistake.
        schedule: The schedule, drawn in the message with the failing action marked.
        rank: The rank of the failing action.
        index: The index of the failing action in the rank's order.

    Attributes:
        action: The failing action.
        rank: The rank that has it, or lacks it.
    """

    def __init__(self, message: str, schedule: Schedule, rank: int, index: int) -> None:
        self._arguments = (message, schedule, rank, index)
        self.action = schedule.actions[rank][index]
        self.rank = rank
        grid = render(schedule, marked=(rank, index), max_columns=_GRID_COLUMNS)
        super().__init__(f"Schedule {schedule.name!r} cannot run: {message}\n{grid}")

    def __reduce__(self) -> tuple[type[ScheduleError], tuple[str, Schedule, int, int]]:
        return type(self), self._arguments


def validate_schedule(schedule: Schedule, *, max_pending_sends: int | None = None) -> None:
    """Validates a schedule, for the executor described at the top of this module.

    Args:
        schedule: The schedule to validate.
        max_pending_sends: Most sends per channel that may be issued and not yet matched by a receive while the sender
            goes on; None for no limit, 0 for blocking sends.

    Raises:
        ScheduleError: An action is missing, repeated or on the wrong rank, comes before one that it depends on, waits
            in a cycle, or computes with parameters that are not there. The error names the action and draws the grid.
    """
    if max_pending_sends is not None and max_pending_sends < 0:
        raise ValueError(f"max_pending_sends is {max_pending_sends}, expected None or a number >= 0.")
    _check_complete(schedule)
    _check_local_order(schedule)
    mistake = mistake_in_state(schedule)
    if mistake is not None:
        message, rank, index = mistake
        raise ScheduleError(message, schedule, rank, index)
    _check_progress(schedule, max_pending_sends)


def _check_complete(schedule: Schedule) -> None:
    """Checks that every phase of every stage and micro-batch is there once, on the rank of the stage."""
    seen: dict[Action, int] = {}
    for rank, order in enumerate(schedule.actions):
        for index, action in enumerate(order):
            if not 0 <= action.stage < schedule.num_stages:
                message = f"{action} on rank {rank} is of a stage outside 0 to {schedule.num_stages - 1}."
            elif action.changes_state and action.microbatch != WHOLE_STEP:
                message = f"{action} on rank {rank} is of micro-batch {action.microbatch}, expected {WHOLE_STEP}."
            elif not (action.changes_state or 0 <= action.microbatch < schedule.num_microbatches):
                message = f"{action} on rank {rank} is of a micro-batch outside 0 to {schedule.num_microbatches - 1}."
            elif schedule.rank_of(action) != rank:
                message = f"{action} is on rank {rank}, but its stage lives on rank {schedule.rank_of(action)}."
            elif action.phase in DEFERRED_PHASES and schedule.is_split(action.stage):
                message = (
                    f"{action} on rank {rank} is a weight gradient of its own, but the forces of stage {action.stage} "
                    "are on another rank than its energies: only folded stages can defer."
                )
            elif action.changes_state:
                continue
            elif action in seen:
                message = f"{action} on rank {rank} is there twice."
            else:
                seen[action] = rank
                continue
            raise ScheduleError(message, schedule, rank, index)
    deferred = not schedule.phases.isdisjoint(DEFERRED_PHASES)
    phases = (*CRITICAL_PHASES, *(DEFERRED_PHASES if deferred else ()))
    if len(seen) == len(phases) * schedule.num_stages * schedule.num_microbatches:
        return
    # The critical phases first: where one of them is wrongly a WF or WE, its name helps more.
    expected = (Action(*a) for a in product(phases, range(schedule.num_stages), range(schedule.num_microbatches)))
    missing = next(action for action in expected if action not in seen)
    rank = schedule.rank_of(missing)
    order = schedule.actions[rank]
    with_missing = (*schedule.actions[:rank], (*order, missing), *schedule.actions[rank + 1 :])
    message = f"{missing} is missing on rank {rank} (drawn at the end of its row)."
    raise ScheduleError(message, replace(schedule, actions=with_missing), rank, len(order))


def _check_local_order(schedule: Schedule) -> None:
    """Checks that every action comes after all actions of its own rank that it depends on."""
    table, num_dependencies = dependency_table(schedule)
    for rank, order in enumerate(schedule.actions):
        met: set[int] = set()
        for index, action in enumerate(order):
            entry, first = table[action.phase][action.stage], action.microbatch * num_dependencies
            for dependency in entry.local_inputs:
                if first + dependency not in met:
                    needed = next(a for a in schedule.dependencies(action) if a in order[index + 1 :])
                    message = f"{action} on rank {rank} comes before {needed}, which it depends on."
                    raise ScheduleError(message, schedule, rank, index)
            met.update(first + dependency for dependency in entry.local_outputs)


class _Progress:
    """Holds the ranks of a schedule as they send, wait and go on, without regard to time."""

    def __init__(self, schedule: Schedule, max_pending_sends: int | None) -> None:
        self.schedule = schedule
        self.max_pending_sends = max_pending_sends
        self.table, self.num_dependencies = dependency_table(schedule)
        self.position = [0] * schedule.num_ranks
        self.has_sent = [False] * schedule.num_ranks
        # By sender and receiver: how many messages are issued, and for how many a receive is posted.
        self.sent = [[0] * schedule.num_ranks for _ in range(schedule.num_ranks)]
        self.posted = [[0] * schedule.num_ranks for _ in range(schedule.num_ranks)]
        # The count of messages in a channel up to each, by micro-batch times dependencies plus dependency.
        self.count: dict[int, int] = {}
        for order in schedule.actions:
            counts = [0] * schedule.num_ranks
            for phase, stage, microbatch in order:
                for target, dependency in self.table[phase][stage].sends:
                    counts[target] += 1
                    self.count[microbatch * self.num_dependencies + dependency] = counts[target]

    def head(self, rank: int) -> Action | None:
        """Returns the action that a rank is at; None at its end."""
        order = self.schedule.actions[rank]
        return order[self.position[rank]] if self.position[rank] < len(order) else None

    def incoming(self, action: Action) -> list[tuple[int, int]]:
        """Returns the messages that an action waits for, as sender and count in the channel."""
        return self._counted(action, self.table[action.phase][action.stage].receives)

    def outgoing(self, action: Action) -> list[tuple[int, int]]:
        """Returns the messages that an action sends, as receiver and count in the channel."""
        return self._counted(action, self.table[action.phase][action.stage].sends)

    def _counted(self, action: Action, messages: list[tuple[int, int]]) -> list[tuple[int, int]]:
        first = action.microbatch * self.num_dependencies
        return [(rank, self.count[first + dependency]) for rank, dependency in messages]

    def advance(self, rank: int) -> set[int]:
        """Lets a rank go as far as it can, and returns the ranks that may go on because of that."""
        touched: set[int] = set()
        while (action := self.head(rank)) is not None:
            if not self.has_sent[rank]:
                is_ready = True
                for sender, count in self.incoming(action):
                    if self.posted[sender][rank] < count:
                        self.posted[sender][rank] = count
                        touched.add(sender)
                    is_ready = is_ready and self.sent[sender][rank] >= count
                if not is_ready:
                    break
                for receiver, count in self.outgoing(action):
                    self.sent[rank][receiver] = count
                    touched.add(receiver)
                self.has_sent[rank] = True
            if self.max_pending_sends is not None and self.waits_for(rank) is not None:
                break
            self.position[rank] += 1
            self.has_sent[rank] = False
        return touched

    def waits_for(self, rank: int) -> int | None:
        """Returns the rank that this one waits for with the action it is at."""
        action = self.head(rank)
        assert action is not None
        if not self.has_sent[rank]:
            return next((sender for sender, count in self.incoming(action) if self.sent[sender][rank] < count), None)
        if self.max_pending_sends is None:
            return None
        for receiver, _ in self.outgoing(action):
            if self.sent[rank][receiver] - self.posted[rank][receiver] > self.max_pending_sends:
                return receiver
        return None

    def describe_wait(self, rank: int) -> str:
        """Says what a stuck rank waits for."""
        action, other = self.head(rank), self.waits_for(rank)
        assert action is not None and other is not None
        if self.has_sent[rank]:
            return f"rank {rank} cannot send the result of {action} until rank {other} receives more"
        expected = zip(self.schedule.received(action), self.incoming(action), strict=True)
        source = next(message.source for message, (sender, count) in expected if self.sent[sender][rank] < count)
        return f"rank {rank} needs {source} of rank {other} for {action}"


def _check_progress(schedule: Schedule, max_pending_sends: int | None) -> None:
    """Checks that all ranks reach the end of their orders."""
    run = _Progress(schedule, max_pending_sends)
    runnable = set(range(schedule.num_ranks))
    while runnable:
        runnable |= run.advance(runnable.pop())
    stuck = [rank for rank in range(schedule.num_ranks) if run.head(rank) is not None]
    if not stuck:
        return
    path: list[int] = []
    rank: int | None = stuck[0]
    while rank is not None and rank not in path:
        path.append(rank)
        rank = run.waits_for(rank)
    assert rank is not None, "a rank that waits for none is not stuck"
    cycle = path[path.index(rank) :]
    waits = ", ".join(map(run.describe_wait, cycle))
    message = f"{run.head(rank)} on rank {rank} waits for itself: {waits}."
    raise ScheduleError(message, schedule, rank, run.position[rank])
