"""Proves that a schedule is complete, keeps its dependencies and cannot deadlock.

The executor that a valid schedule is safe with is this one, and it may do more but not less:

1. Every ordered pair of ranks has a channel of its own (a process group per direction whose sends and receives with
   different peers do not wait for one another). A channel matches sends with receives strictly in order, without
   looking at what they carry.
2. A rank runs its actions in order. Before an action it has posted the receives of that action's messages, and of all
   that their senders send it before these, in the senders' order, and waits for its messages. It may post more receives
   ahead. What comes before it is used is kept.
3. After an action a rank issues the sends of the result, if there are any. A send has rendezvous semantics: it is
   complete only when the receiver has posted the receive. The rank does not wait for that (isend) and keeps the
   tensor until then.

Point 3 is as weak as it can be. Were a send to block its rank, even plain 1F1B would deadlock: in its steady state
two neighbours send to one another at the same time. How many unmatched sends a channel must be able to hold
is therefore a parameter, ``max_pending_sends``: None for an executor that holds as many as come, 0 for blocking sends
(``gpipe`` passes), 1 for one buffer per channel. A receive that is always posted n messages ahead counts as n buffers.

The waits must have no cycle. Waiting is monotone (a step that can be taken stays possible until it is taken), so
running the schedule once, in any order of ranks, decides for every timing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from lightning_januspipe.schedule.actions import CRITICAL_PHASES, DEFERRED_PHASES, Action, Schedule
from lightning_januspipe.schedule.dependency_table import dependency_table
from lightning_januspipe.schedule.render import render

_GRID_COLUMNS = 15


class ScheduleError(ValueError):
    """A schedule that cannot run.

    Args:
        message: What is wrong.
        schedule: The schedule, drawn in the message with the failing action marked.
        rank: The rank of the failing action.
        place: The place of the failing action in the rank's order.

    Attributes:
        action: The failing action.
        rank: The rank that holds it, or lacks it.
    """

    def __init__(self, message: str, schedule: Schedule, rank: int, place: int) -> None:
        self._arguments = (message, schedule, rank, place)
        self.action = schedule.actions[rank][place]
        self.rank = rank
        grid = render(schedule, marked=(rank, place), max_columns=_GRID_COLUMNS)
        super().__init__(f"Schedule {schedule.name!r} cannot run: {message}\n{grid}")

    def __reduce__(self) -> tuple[type[ScheduleError], tuple[str, Schedule, int, int]]:
        return type(self), self._arguments


def validate(schedule: Schedule, *, max_pending_sends: int | None = None) -> None:
    """Prove a schedule, for the executor described at the top of this module.

    Args:
        schedule: The schedule to prove.
        max_pending_sends: Most sends per channel that may be issued and not yet matched by a receive while the sender
            goes on; None for no limit, 0 for blocking sends.

    Raises:
        ScheduleError: If an action is missing, repeated or on the wrong rank, comes before one that it depends on, or
            waits in a cycle. The error names the action and draws the grid.
    """
    if max_pending_sends is not None and max_pending_sends < 0:
        raise ValueError(f"max_pending_sends is {max_pending_sends}, expected None or a number >= 0.")
    _check_complete(schedule)
    _check_local_order(schedule)
    _check_progress(schedule, max_pending_sends)


def _check_complete(schedule: Schedule) -> None:
    """Every phase of every stage and micro-batch is there once, on the rank of the stage."""
    seen: dict[Action, int] = {}
    for rank, order in enumerate(schedule.actions):
        for place, action in enumerate(order):
            if not 0 <= action.stage < schedule.num_stages:
                message = f"{action} on rank {rank} is of a stage outside 0 to {schedule.num_stages - 1}."
            elif not 0 <= action.microbatch < schedule.num_microbatches:
                message = f"{action} on rank {rank} is of a micro-batch outside 0 to {schedule.num_microbatches - 1}."
            elif schedule.rank_of(action) != rank:
                message = f"{action} is on rank {rank}, but its stage lives on rank {schedule.rank_of(action)}."
            elif action.phase in DEFERRED_PHASES and schedule.is_split(action.stage):
                message = (
                    f"{action} on rank {rank} is a weight gradient of its own, but the forces of stage {action.stage} "
                    "are on another rank than its energies: only folded stages can defer."
                )
            elif action in seen:
                message = f"{action} on rank {rank} is there twice."
            else:
                seen[action] = rank
                continue
            raise ScheduleError(message, schedule, rank, place)
    deferred = not schedule.phases.isdisjoint(DEFERRED_PHASES)
    phases = (*CRITICAL_PHASES, *(DEFERRED_PHASES if deferred else ()))
    if len(seen) == len(phases) * schedule.num_stages * schedule.num_microbatches:
        return
    # Phases of the chain first: where one of them is wrongly a WF or WE, that is the one to name.
    expected = (Action(*a) for a in product(phases, range(schedule.num_stages), range(schedule.num_microbatches)))
    missing = next(action for action in expected if action not in seen)
    rank = schedule.rank_of(missing)
    order = schedule.actions[rank]
    with_missing = (*schedule.actions[:rank], (*order, missing), *schedule.actions[rank + 1 :])
    message = f"{missing} is missing on rank {rank} (drawn at the end of its row)."
    raise ScheduleError(message, replace(schedule, actions=with_missing), rank, len(order))


def _check_local_order(schedule: Schedule) -> None:
    """An action comes after everything on its own rank that it depends on."""
    steps, num_edges = dependency_table(schedule)
    for rank, order in enumerate(schedule.actions):
        met: set[int] = set()
        for place, action in enumerate(order):
            step, first_edge = steps[action.phase][action.stage], action.microbatch * num_edges
            for edge in step.takes:
                if first_edge + edge not in met:
                    needed = next(a for a in schedule.dependencies(action) if a in order[place + 1 :])
                    message = f"{action} on rank {rank} comes before {needed}, which it depends on."
                    raise ScheduleError(message, schedule, rank, place)
            met.update(first_edge + edge for edge in step.hands_on)


class _Run:
    """The ranks of a schedule as they send, wait and go on, without regard to time."""

    def __init__(self, schedule: Schedule, max_pending_sends: int | None) -> None:
        self.schedule = schedule
        self.max_pending_sends = max_pending_sends
        self.steps, self.num_edges = dependency_table(schedule)
        self.place = [0] * schedule.num_ranks
        self.has_sent = [False] * schedule.num_ranks
        # By sender and receiver: how many messages are issued, and for how many a receive is posted.
        self.sent = [[0] * schedule.num_ranks for _ in range(schedule.num_ranks)]
        self.posted = [[0] * schedule.num_ranks for _ in range(schedule.num_ranks)]
        # The number of each message in its channel, from 1 on, by micro-batch times edges plus edge.
        self.number: dict[int, int] = {}
        for order in schedule.actions:
            count = [0] * schedule.num_ranks
            for phase, stage, microbatch in order:
                for target, edge in self.steps[phase][stage].sends:
                    count[target] += 1
                    self.number[microbatch * self.num_edges + edge] = count[target]

    def head(self, rank: int) -> Action | None:
        """The action that a rank is at; None at its end."""
        order = self.schedule.actions[rank]
        return order[self.place[rank]] if self.place[rank] < len(order) else None

    def incoming(self, action: Action) -> list[tuple[int, int]]:
        """The messages that an action waits for, as sender and number in the channel."""
        first_edge = action.microbatch * self.num_edges
        return [(r, self.number[first_edge + edge]) for r, edge in self.steps[action.phase][action.stage].receives]

    def outgoing(self, action: Action) -> list[tuple[int, int]]:
        """The messages that an action sends, as receiver and number in the channel."""
        first_edge = action.microbatch * self.num_edges
        return [(r, self.number[first_edge + edge]) for r, edge in self.steps[action.phase][action.stage].sends]

    def advance(self, rank: int) -> set[int]:
        """Let a rank go as far as it can; return the ranks that this may have set free."""
        touched: set[int] = set()
        while (action := self.head(rank)) is not None:
            if not self.has_sent[rank]:
                is_ready = True
                for sender, number in self.incoming(action):
                    if self.posted[sender][rank] < number:
                        self.posted[sender][rank] = number
                        touched.add(sender)
                    is_ready = is_ready and self.sent[sender][rank] >= number
                if not is_ready:
                    break
                for receiver, number in self.outgoing(action):
                    self.sent[rank][receiver] = number
                    touched.add(receiver)
                self.has_sent[rank] = True
            if self.max_pending_sends is not None and self.waits_for(rank) is not None:
                break
            self.place[rank] += 1
            self.has_sent[rank] = False
        return touched

    def waits_for(self, rank: int) -> int | None:
        """The rank that must do something before this one can go on with the action it is at."""
        action = self.head(rank)
        assert action is not None
        if not self.has_sent[rank]:
            return next((r for r, number in self.incoming(action) if self.sent[r][rank] < number), None)
        if self.max_pending_sends is None:
            return None
        for receiver, _ in self.outgoing(action):
            if self.sent[rank][receiver] - self.posted[rank][receiver] > self.max_pending_sends:
                return receiver
        return None

    def describe_wait(self, rank: int) -> str:
        """What a rank that is stuck waits for."""
        action, other = self.head(rank), self.waits_for(rank)
        assert action is not None and other is not None
        if self.has_sent[rank]:
            return f"rank {rank} cannot send the result of {action} until rank {other} receives more"
        expected = zip(self.schedule.received(action), self.incoming(action), strict=True)
        source = next(message.source for message, (r, number) in expected if self.sent[r][rank] < number)
        return f"rank {rank} needs {source} of rank {other} for {action}"


def _check_progress(schedule: Schedule, max_pending_sends: int | None) -> None:
    """All ranks reach the end of their orders."""
    run = _Run(schedule, max_pending_sends)
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
    raise ScheduleError(message, schedule, rank, run.place[rank])
