"""Schedules as data: phases, actions, phase costs, and the ordered actions of every rank.

One micro-batch walks the chain of ``S`` stages four times (arXiv 2605.18404, SymFold)::

    FE  forward energy   stage 0 -> S-1
    FF  forward force    stage S-1 -> 0
    BF  backward force   stage 0 -> S-1
    BE  backward energy  stage S-1 -> 0

All four phases of a stage run on one rank (the chain folds on itself), so each phase hands its result to
a neighbouring stage, or, at the two folds, to the next phase of the same stage. ``WF`` and ``WE`` are the parts of
``BF`` and ``BE`` that feed weight gradients only; nothing waits for them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TypeAlias


class Phase(str, Enum):
    """One pass over a stage. ``WF`` and ``WE`` are the deferred weight gradients of ``BF`` and ``BE``."""

    FE = "FE"
    FF = "FF"
    BF = "BF"
    BE = "BE"
    WF = "WF"
    WE = "WE"


CHAIN_PHASES = (Phase.FE, Phase.FF, Phase.BF, Phase.BE)
"""The phases on the critical path, in the order in which a micro-batch goes through them."""

DEFERRED_PHASES = {Phase.WF: Phase.BF, Phase.WE: Phase.BE}
"""The phases off the critical path, each with the phase that it is split from."""

_DOWNWARD = (Phase.FE, Phase.BF)
_ACTION_PATTERN = re.compile(r"([A-Z]{2})(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One phase of one stage for one micro-batch; written ``FE0.3`` (phase, stage, micro-batch)."""

    phase: Phase
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.phase.value}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read an action from its text form.

        Raises:
            ValueError: If ``text`` is not a phase, a stage and a micro-batch as in ``FE0.3``.
        """
        match = _ACTION_PATTERN.fullmatch(text.strip())
        if match is None or match[1] not in Phase.__members__:
            raise ValueError(
                f"{text!r} is not an action: write phase, stage and micro-batch like 'FE0.3', "
                f"with a phase out of {', '.join(Phase.__members__)}."
            )
        return cls(Phase[match[1]], int(match[2]), int(match[3]))


def predecessor(action: Action, num_stages: int) -> Action | None:
    """The action whose output ``action`` takes in along the chain; None for the chain's first action and for WF, WE."""
    phase, stage, microbatch = action.phase, action.stage, action.microbatch
    if phase in DEFERRED_PHASES:
        return None
    previous_stage = stage - 1 if phase in _DOWNWARD else stage + 1
    if 0 <= previous_stage < num_stages:
        return Action(phase, previous_stage, microbatch)
    index = CHAIN_PHASES.index(phase)
    return Action(CHAIN_PHASES[index - 1], stage, microbatch) if index else None


def successor(action: Action, num_stages: int) -> Action | None:
    """The action that takes in the output of ``action``; None for the chain's last action and for WF, WE."""
    phase, stage, microbatch = action.phase, action.stage, action.microbatch
    if phase in DEFERRED_PHASES:
        return None
    next_stage = stage + 1 if phase in _DOWNWARD else stage - 1
    if 0 <= next_stage < num_stages:
        return Action(phase, next_stage, microbatch)
    index = CHAIN_PHASES.index(phase)
    return Action(CHAIN_PHASES[index + 1], stage, microbatch) if index + 1 < len(CHAIN_PHASES) else None


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """The actions that must have ended before ``action`` may start.

    These are the action before it on the chain, whose output it takes in, and the previous phase of its own stage,
    whose saved tensors it reads. A deferred weight gradient waits for the phase that it is split from.

    Args:
        action: The action that waits.
        num_stages: The number of stages of the chain.
    """
    phase, stage, microbatch = action.phase, action.stage, action.microbatch
    if phase in DEFERRED_PHASES:
        return (Action(DEFERRED_PHASES[phase], stage, microbatch),)
    before = predecessor(action, num_stages)
    if before is None:
        return ()
    if phase is Phase.FE or before.stage == stage:
        return (before,)
    return before, Action(CHAIN_PHASES[CHAIN_PHASES.index(phase) - 1], stage, microbatch)


@dataclass(frozen=True, slots=True)
class PhaseCosts:
    """Times of one rank's share of one micro-batch, in any one unit of time.

    ``wf`` and ``we`` are the deferrable parts of the two backward phases and are not counted in ``bf`` and ``be``. A
    schedule without WF (or WE) actions spends them inside BF (or BE).
    """

    fe: float
    ff: float
    bf: float
    be: float
    wf: float = 0.0
    we: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            deferrable = field.name in ("wf", "we")
            is_time = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_time or value < 0 or (value == 0 and not deferrable):
                expected = "a finite time >= 0" if deferrable else "a finite time > 0"
                raise ValueError(
                    f"PhaseCosts.{field.name} is {value!r}, expected {expected}: pass the measured time of the phase."
                )

    @property
    def total(self) -> float:
        """Time of one rank's whole work on one micro-batch."""
        return self.fe + self.ff + self.bf + self.be + self.wf + self.we

    def of(self, phase: Phase) -> float:
        """Time of one phase."""
        return float(getattr(self, phase.value.lower()))

    def fused(self) -> PhaseCosts:
        """The same work with nothing deferred: ``wf`` inside ``bf`` and ``we`` inside ``be``."""
        return PhaseCosts(self.fe, self.ff, self.bf + self.wf, self.be + self.we)


Costs: TypeAlias = PhaseCosts | Sequence[PhaseCosts]
"""The same costs on all ranks, or one entry per rank."""


def costs_per_rank(costs: Costs, num_ranks: int) -> tuple[PhaseCosts, ...]:
    """Spell ``costs`` out for every rank.

    Raises:
        ValueError: If ``costs`` is neither one `PhaseCosts` nor one for each of the ``num_ranks`` ranks.
    """
    if isinstance(costs, PhaseCosts):
        return (costs,) * num_ranks
    per_rank = tuple(costs) if isinstance(costs, Iterable) else ()
    if len(per_rank) != num_ranks or not all(isinstance(entry, PhaseCosts) for entry in per_rank):
        raise ValueError(f"costs is {costs!r}, expected one PhaseCosts, or a sequence of {num_ranks}, one per rank.")
    return per_rank


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, in the order in which the rank runs them.

    Args:
        name: Name of the schedule, as given to `build_schedule`.
        num_ranks: Number of pipeline ranks.
        num_microbatches: Number of micro-batches of one training step.
        actions: One tuple of actions per rank.
        placement: The rank of each stage. Empty stands for stage ``s`` on rank ``s``.

    Raises:
        ValueError: If the sizes do not fit one another. Whether the order of the actions can run is the question
            that `validate` answers.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...] = ()

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
        if any(not 0 <= rank < self.num_ranks for rank in self.placement):
            raise ValueError(f"The placement {self.placement} names ranks outside 0 to {self.num_ranks - 1}.")

    @property
    def num_stages(self) -> int:
        """Number of stages of the chain."""
        return len(self.placement)

    @property
    def phases(self) -> frozenset[Phase]:
        """The phases that occur; WF and WE do where weight gradients are deferred."""
        return frozenset(action.phase for order in self.actions for action in order)

    def rank_of(self, action: Action) -> int:
        """The rank that holds the stage of ``action``."""
        return self.placement[action.stage]

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """The actions that must have ended before ``action`` may start (see `dependencies`)."""
        return dependencies(action, self.num_stages)

    def sender(self, action: Action) -> int | None:
        """The rank that ``action`` gets a message from, or None if its input is at hand."""
        return self._neighbour(action, predecessor)

    def receiver(self, action: Action) -> int | None:
        """The rank that ``action`` sends a message to, or None if its output stays on the rank."""
        return self._neighbour(action, successor)

    def _neighbour(self, action: Action, step: Callable[[Action, int], Action | None]) -> int | None:
        other = step(action, self.num_stages)
        if other is None or self.rank_of(other) == self.rank_of(action):
            return None
        return self.rank_of(other)

    def __str__(self) -> str:
        placement = " ".join(map(str, self.placement))
        lines = [f"{self.name}: {self.num_microbatches} micro-batches, stages on ranks {placement}"]
        lines += [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.actions)]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule from the text that ``str(schedule)`` gives.

        Raises:
            ValueError: If the text has another form.
        """
        head, *lines = text.strip().splitlines() or [""]
        match = re.fullmatch(r"([^:]+): (\d+) micro-batches, stages on ranks (\d+(?: \d+)*)", head.strip())
        if match is None:
            raise ValueError(
                f"The schedule begins with {head!r}, expected 'NAME: M micro-batches, stages on ranks 0 1 ...'."
            )
        rows = [line.partition(":") for line in lines]
        return cls._from_rows(
            match[1], match[2], match[3], [(key.removeprefix("rank"), row.split()) for key, _, row in rows]
        )

    def to_csv(self) -> str:
        """Write the schedule as comma-separated values: three rows of sizes, then one row of actions per rank."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("name", self.name))
        writer.writerow(("num_microbatches", self.num_microbatches))
        writer.writerow(("placement", *self.placement))
        writer.writerows((rank, *map(str, order)) for rank, order in enumerate(self.actions))
        return stream.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """Read a schedule from the text that `to_csv` gives.

        Raises:
            ValueError: If the text has another form.
        """
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        keys = [row[0] for row in rows[:3]]
        if keys != ["name", "num_microbatches", "placement"] or any(len(row) < 2 for row in rows[:3]):
            raise ValueError(f"The first rows are {keys}, expected name, num_microbatches and placement with values.")
        name, num_microbatches, placement = (row[1:] for row in rows[:3])
        return cls._from_rows(
            name[0], num_microbatches[0], " ".join(placement), [(row[0], row[1:]) for row in rows[3:]]
        )

    @classmethod
    def _from_rows(
        cls, name: str, num_microbatches: str, placement: str, rows: list[tuple[str, list[str]]]
    ) -> Schedule:
        ranks = [key.strip() for key, _ in rows]
        if ranks != [str(rank) for rank in range(len(rows))]:
            raise ValueError(f"The rows of actions are of ranks {ranks}, expected 0, 1, 2, ... in order.")
        actions = tuple(tuple(map(Action.parse, row)) for _, row in rows)
        return cls(name, len(rows), int(num_microbatches), actions, tuple(map(int, placement.split())))
