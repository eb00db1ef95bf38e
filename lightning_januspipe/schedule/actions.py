"""Holds schedules as data: phases, actions, and the actions of every rank in their order.

One micro-batch goes through the ``S`` stages four times (arXiv 2605.18404, SymFold)::

    FE  forward energy   stage 0 -> S-1
    FF  forward force    stage S-1 -> 0
    BF  backward force   stage 0 -> S-1
    BE  backward energy  stage S-1 -> 0

In a folded schedule all four phases of a stage run on one rank, so each phase sends its result to a neighbouring
stage, or, at the two folds, to the next phase of the same stage. In an unfolded schedule a stage can be split: its FF
and BF run on another rank than its FE and BE, and that rank computes FE once more. ``WF`` and ``WE`` are the parts of
``BF`` and ``BE`` that only weight gradients need; no other rank waits for them.

Where the ranks that hold the same stage (replicas and graph ranks) share its state, three more actions are of the whole
step, and not of a micro-batch (see :mod:`~lightning_januspipe.schedule.state_actions`)::

    UNSHARD  gathers the parameters of a stage
    RESHARD  releases them
    REDUCE   sums the gradients of a stage over the ranks that hold it
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Phase(str, Enum):
    """Names one pass over a stage, or a change of its sharded state.

    ``WF`` and ``WE`` are the deferred weight gradients of ``BF`` and ``BE``.
    """

    FE = "FE"
    FF = "FF"
    BF = "BF"
    BE = "BE"
    WF = "WF"
    WE = "WE"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE = "REDUCE"

    __hash__ = str.__hash__  # that of Enum is many times slower, and actions are keys everywhere


CRITICAL_PHASES = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)
"""The phases that other ranks wait for, in the order in which a micro-batch goes through them."""

DEFERRED_PHASES = {Phase.WF: Phase.BF, Phase.WE: Phase.BE}
"""The phases that no other rank waits for, each with the phase that they are a part of."""

COMPUTED_PHASES = (*CRITICAL_PHASES, *DEFERRED_PHASES)
"""The phases of a micro-batch."""

STATE_CHANGES = (Phase.UNSHARD, Phase.RESHARD, Phase.REDUCE)
"""The changes of a stage's sharded state, which are of the whole step. Their micro-batch is :data:`WHOLE_STEP`."""

WHOLE_STEP = -1
"""The micro-batch of actions that are of the whole step."""

_DOWNWARD = (Phase.FE, Phase.BF)
_PREVIOUS = {Phase.FF: Phase.FE, Phase.BF: Phase.FF, Phase.BE: Phase.BF}
_NEXT = {before: phase for phase, before in _PREVIOUS.items()}
_FORCE_PHASES = (Phase.FF, Phase.BF, Phase.WF)
_HEAD_PATTERN = re.compile(
    r"([^:]+): (\d+) micro-batches, stages on ranks (\d+(?: \d+)*)(?:, forces on ranks (\d+(?: \d+)*))?"
)
_ACTION_PATTERN = re.compile(r"([A-Z]{2})(\d+)\.(\d+)|(UNSHARD|RESHARD|REDUCE)(\d+)")


class Action(NamedTuple):
    """Names one phase of one stage for one micro-batch; it is written ``FE0.3`` (phase, stage, micro-batch).

    A change of the state of stage 0 is written ``REDUCE0``.
    """

    phase: Phase
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.phase.value}{self.stage}" + ("" if self.changes_state else f".{self.microbatch}")

    @property
    def changes_state(self) -> bool:
        """Tells whether this is a change of a stage's sharded state, and not a phase of a micro-batch."""
        return self.phase in STATE_CHANGES

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads an action from its text form.

        Raises:
            ValueError: The text is not a phase, a stage and a micro-batch as in ``FE0.3``, or a change of the state of
                a stage as in ``REDUCE0``.
        """
        match = _ACTION_PATTERN.fullmatch(text.strip())
        if match is not None and match[4]:
            return cls(Phase[match[4]], int(match[5]), WHOLE_STEP)
        if match is None or match[1] not in Phase.__members__:
            phases, changes = (", ".join(p.value for p in some) for some in (COMPUTED_PHASES, STATE_CHANGES))
            raise ValueError(
                f"{text!r} is not an action: write phase, stage and micro-batch like 'FE0.3', where the phase is one "
                f"of {phases}, or a change of a stage's state like 'REDUCE0', one of {changes}."
            )
        return cls(Phase[match[1]], int(match[2]), int(match[3]))


def predecessor(action: Action, num_stages: int) -> Action | None:
    """Returns the action whose output an action reads; None for a micro-batch's first action, WF and WE."""
    phase, stage, microbatch = action
    if phase in DEFERRED_PHASES or action.changes_state:
        return None
    previous_stage = stage - 1 if phase in _DOWNWARD else stage + 1
    if 0 <= previous_stage < num_stages:
        return Action(phase, previous_stage, microbatch)
    before = _PREVIOUS.get(phase)
    return None if before is None else Action(before, stage, microbatch)


def successor(action: Action, num_stages: int) -> Action | None:
    """Returns the action that reads the output of an action; None for a micro-batch's last action, WF and WE."""
    phase, stage, microbatch = action
    if phase in DEFERRED_PHASES or action.changes_state:
        return None
    next_stage = stage + 1 if phase in _DOWNWARD else stage - 1
    if 0 <= next_stage < num_stages:
        return Action(phase, next_stage, microbatch)
    after = _NEXT.get(phase)
    return None if after is None else Action(after, stage, microbatch)


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Returns the actions that must have ended before an action may start.

    An action waits for its predecessor, whose output it reads, and for the previous phase of its own stage, whose saved
    tensors it reads. A deferred weight gradient waits for the phase that it is a part of, and WE also for WF, which
    leaves it the gradients that it found at the graph of FE.

    Args:
        action: The action that waits.
        num_stages: Number of stages of the potential.
    """
    phase, stage, microbatch = action
    if phase is Phase.WF:
        return (Action(Phase.BF, stage, microbatch),)
    if phase is Phase.WE:
        return Action(Phase.BE, stage, microbatch), Action(Phase.WF, stage, microbatch)
    before = predecessor(action, num_stages)
    if before is None:
        return ()
    if phase is Phase.FE or before.stage == stage:
        return (before,)
    return before, Action(_PREVIOUS[phase], stage, microbatch)


class Message(NamedTuple):
    """Names a message by the action that sends it and the action, on another rank, that waits for it."""

    source: Action
    target: Action


@dataclass(frozen=True)
class Schedule:
    """Holds the actions of every rank, in the order in which the rank runs them.

    Args:
        name: Name of the schedule, as in `build_schedule`.
        num_ranks: Number of pipeline ranks.
        num_microbatches: Number of micro-batches of one training step.
        actions: One tuple of actions per rank.
        placement: The rank of FE, BE and WE of each stage. Empty stands for stage ``s`` on rank ``s``.
        force_placement: The rank of FF, BF and WF of each stage. Empty stands for ``placement``: a folded schedule.

    Raises:
        ValueError: The sizes do not fit each other. Whether the actions can run in their order is checked by
            `validate`.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...] = ()
    force_placement: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_microbatches < 1:
            raise ValueError(
                f"A schedule needs at least one rank and one micro-batch, got num_ranks={self.num_ranks} and "
                f"num_microbatches={self.num_microbatches}."
            )
        if not self.name or any(character in self.name for character in ":\n\r"):
            raise ValueError(f"The schedule's name is {self.name!r}, expected one line of text without a colon.")
        if len(self.actions) != self.num_ranks:
            raise ValueError(f"Got actions for {len(self.actions)} ranks, expected num_ranks={self.num_ranks}.")
        object.__setattr__(self, "actions", tuple(tuple(order) for order in self.actions))
        object.__setattr__(self, "placement", tuple(self.placement) or tuple(range(self.num_ranks)))
        object.__setattr__(self, "force_placement", tuple(self.force_placement) or self.placement)
        for placement in (self.placement, self.force_placement):
            if any(not 0 <= rank < self.num_ranks for rank in placement):
                raise ValueError(f"The placement {placement} names ranks outside 0 to {self.num_ranks - 1}.")
        if len(self.force_placement) != self.num_stages:
            raise ValueError(
                f"force_placement names {len(self.force_placement)} stages, expected {self.num_stages} as in placement."
            )

    @property
    def num_stages(self) -> int:
        """Returns the number of stages."""
        return len(self.placement)

    @property
    def phases(self) -> frozenset[Phase]:
        """Returns the phases that occur; WF and WE are among them where weight gradients are deferred."""
        return frozenset(action.phase for order in self.actions for action in order)

    @property
    def is_folded(self) -> bool:
        """Tells whether all phases of each stage are on one rank."""
        return self.placement == self.force_placement

    def is_split(self, stage: int) -> bool:
        """Tells whether a stage is split: its FF and BF run on another rank than its FE and BE."""
        return self.placement[stage] != self.force_placement[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages that have a phase on a rank."""
        both = enumerate(zip(self.placement, self.force_placement, strict=True))
        return tuple(stage for stage, ranks in both if rank in ranks)

    def rank_of(self, action: Action) -> int:
        """Returns the rank that runs an action."""
        return (self.force_placement if action.phase in _FORCE_PHASES else self.placement)[action.stage]

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """Returns the actions that must have ended before an action may start (see `dependencies`)."""
        return dependencies(action, self.num_stages)

    def sent(self, action: Action) -> tuple[Message, ...]:
        """Returns the messages that an action sends, in order.

        The first goes to the successor. A split stage also sends one from FE to FF and from BF to BE.
        """
        rank = self.rank_of(action)
        after = successor(action, self.num_stages)
        found: tuple[Message, ...] = () if after is None or self.rank_of(after) == rank else (Message(action, after),)
        phase, stage, microbatch = action
        if phase in _DOWNWARD and self.is_split(stage):
            own = Action(_NEXT[phase], stage, microbatch)
            if own != after:
                found += (Message(action, own),)
        return found

    def received(self, action: Action) -> tuple[Message, ...]:
        """Returns the messages that an action waits for, the one of its predecessor first."""
        rank = self.rank_of(action)
        return tuple(Message(d, action) for d in self.dependencies(action) if self.rank_of(d) != rank)

    def messages(self) -> dict[tuple[int, int], list[Message]]:
        """Returns the messages of every ordered pair of ranks, in the order in which they are sent."""
        found: dict[tuple[int, int], list[Message]] = {}
        for rank, order in enumerate(self.actions):
            for action in order:
                for message in self.sent(action):
                    found.setdefault((rank, self.rank_of(message.target)), []).append(message)
        return found

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_microbatches} micro-batches, stages on ranks {_numbers(self.placement)}"]
        if not self.is_folded:
            lines[0] += f", forces on ranks {_numbers(self.force_placement)}"
        lines += [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.actions)]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Reads a schedule from the text that ``str(schedule)`` gives.

        Raises:
            ValueError: The text has another form.
        """
        head, *lines = text.strip().splitlines() or [""]
        match = _HEAD_PATTERN.fullmatch(head.strip())
        if match is None:
            raise ValueError(
                f"The schedule begins with {head!r}, expected 'NAME: M micro-batches, stages on ranks 0 1 ...', and "
                "', forces on ranks 0 1 ...' where these differ."
            )
        rows = [line.partition(":") for line in lines]
        actions = [(key.removeprefix("rank"), row.split()) for key, _, row in rows]
        return cls._from_rows(match[1], match[2], match[3], match[4] or "", actions)

    def to_csv(self) -> str:
        """Returns the schedule as comma-separated values: rows of sizes and placements, then one row per rank."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", self.name))
        writer.writerow(("num_microbatches", self.num_microbatches))
        writer.writerow(("placement", *self.placement))
        if not self.is_folded:
            writer.writerow(("force_placement", *self.force_placement))
        writer.writerows((rank, *map(str, order)) for rank, order in enumerate(self.actions))
        return stream.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """Reads a schedule from the text that `to_csv` gives.

        Raises:
            ValueError: The text has another form.
        """
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        keys = [row[0] for row in rows[:3]]
        if keys != ["name", "num_microbatches", "placement"] or any(len(row) < 2 for row in rows[:3]):
            raise ValueError(f"The first rows are {keys}, expected name, num_microbatches and placement with values.")
        name, num_microbatches, placement = (row[1:] for row in rows[:3])
        is_unfolded = len(rows) > 3 and rows[3][0] == "force_placement"
        forces = " ".join(rows[3][1:]) if is_unfolded else ""
        actions = [(row[0], row[1:]) for row in rows[4 if is_unfolded else 3 :]]
        return cls._from_rows(name[0], num_microbatches[0], " ".join(placement), forces, actions)

    @classmethod
    def _from_rows(
        cls, name: str, num_microbatches: str, placement: str, forces: str, rows: list[tuple[str, list[str]]]
    ) -> Schedule:
        ranks = [key.strip() for key, _ in rows]
        if ranks != [str(rank) for rank in range(len(rows))]:
            raise ValueError(f"The rows of actions are of ranks {ranks}, expected 0, 1, 2, ... in order.")
        actions = tuple(tuple(map(Action.parse, row)) for _, row in rows)
        return cls(
            name,
            len(rows),
            int(num_microbatches),
            actions,
            tuple(map(int, placement.split())),
            tuple(map(int, forces.split())),
        )


def _numbers(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
