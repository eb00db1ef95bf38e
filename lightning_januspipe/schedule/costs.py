"""Holds the costs of stages: times of phases, bytes that a micro-batch holds between them, and costs of messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

from lightning_januspipe.schedule.actions import COMPUTED_PHASES, DEFERRED_PHASES, Phase, Schedule


@dataclass(frozen=True, slots=True)
class PhaseCosts:
    """Holds the phase times of one rank's share of one micro-batch, in any one unit of time.

    ``wf`` and ``we`` are the deferrable parts of the two backward phases and are not counted in ``bf`` and ``be``. A
    schedule without WF and WE actions spends them inside BF and BE.
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
        """Returns the time of one rank's whole work on one micro-batch."""
        return self.fe + self.ff + self.bf + self.be + self.wf + self.we

    def of(self, phase: Phase) -> float:
        """Returns the time of one phase."""
        return float(getattr(self, phase.value.lower()))

    def fused(self) -> PhaseCosts:
        """Returns the costs of the same work with nothing deferred: ``wf`` inside ``bf`` and ``we`` inside ``be``."""
        return PhaseCosts(self.fe, self.ff, self.bf + self.wf, self.be + self.we)


@dataclass(frozen=True, slots=True)
class MemoryCosts:
    """Holds the bytes that one micro-batch keeps on one rank's share of the model.

    Args:
        energy: Bytes that FE saves, held from FE to BE (to WE, where it is deferred).
        force: Bytes that FF saves in addition, held from FF to BF (to WF, where it is deferred).
        kept: Bytes that BF keeps for BE, held from BF to BE (WE).
    """

    energy: float
    force: float
    kept: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ValueError(f"MemoryCosts.{field.name} is {value!r}, expected a finite number of bytes >= 0.")

    @property
    def total(self) -> float:
        """Returns the most bytes that one micro-batch keeps: all of them, while BF runs."""
        return self.energy + self.force + self.kept


@dataclass(frozen=True, slots=True)
class StateCosts:
    """Holds what the sharded state of a stage costs on one of the ranks that hold it.

    Args:
        gather: Time from the start of UNSHARD until the parameters are there.
        reduce: Time from the start of REDUCE until the rank has its shard of the gradients.
        parameters: Bytes that UNSHARD allocates and RESHARD frees.
        gradients: Bytes of the gradients, held from the first BF or BE until REDUCE has ended.
    """

    gather: float = 0.0
    reduce: float = 0.0
    parameters: float = 0.0
    gradients: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ValueError(f"StateCosts.{field.name} is {value!r}, expected a finite number >= 0.")

    @classmethod
    def of(cls, num_ranks: int, num_bytes: float, link: Link) -> StateCosts:
        """Returns the costs of a stage whose ranks pass shards on in a ring.

        Args:
            num_ranks: Ranks that hold the stage.
            num_bytes: Bytes of its parameters.
            link: Latency and bandwidth of a message between two of these ranks.
        """
        time = (num_ranks - 1) * (link.latency + num_bytes / num_ranks / link.bandwidth)
        return cls(time, time, num_bytes, num_bytes)


@dataclass(frozen=True, slots=True)
class Link:
    """Holds the costs of a message between two ranks, in the unit of time of the phases.

    Args:
        latency: Time of every message.
        bandwidth: Bytes per unit of time, in each direction between two ranks; messages of one direction follow each
            other.
        message_bytes: Bytes of a message.
    """

    latency: float = 0.0
    bandwidth: float = math.inf
    message_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("latency", self.latency), ("message_bytes", self.message_bytes)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Link.{name} is {value!r}, expected a finite number >= 0.")
        if not self.bandwidth > 0:
            raise ValueError(f"Link.bandwidth is {self.bandwidth!r}, expected a number > 0 (math.inf for no limit).")

    @property
    def occupied(self) -> float:
        """Returns the time for which a message keeps the following ones of its direction waiting."""
        return self.message_bytes / self.bandwidth


Costs: TypeAlias = PhaseCosts | Sequence[PhaseCosts]
"""The same costs on all ranks, or one entry per rank, or one per stage."""

Memory: TypeAlias = MemoryCosts | Sequence[MemoryCosts]
"""As `Costs`, of bytes."""

State: TypeAlias = StateCosts | Sequence[StateCosts]
"""As `Costs`, of sharded state."""

_Entry = TypeVar("_Entry", PhaseCosts, MemoryCosts, StateCosts)


def costs_per_stage(costs: Costs, num_ranks: int, num_stages: int) -> tuple[PhaseCosts, ...]:
    """Returns the costs of every stage.

    A single entry is one rank's share, and each stage has ``num_ranks / num_stages`` of it. One entry per rank stands
    for equal pieces of the potential, from its first layer to its last.

    Raises:
        ValueError: ``costs`` is neither one `PhaseCosts`, nor one per rank, nor one per stage.
    """
    return _per_stage(PhaseCosts, "costs", costs, num_ranks, num_stages)


def memory_per_stage(memory: Memory, num_ranks: int, num_stages: int) -> tuple[MemoryCosts, ...]:
    """Returns the bytes of every stage, as `costs_per_stage` does its times."""
    return _per_stage(MemoryCosts, "memory", memory, num_ranks, num_stages)


def state_per_stage(state: State, num_ranks: int, num_stages: int) -> tuple[StateCosts, ...]:
    """Returns the costs of the sharded state of every stage, as `costs_per_stage` does its times."""
    return _per_stage(StateCosts, "state", state, num_ranks, num_stages)


def _per_stage(kind: type[_Entry], name: str, given: Any, num_ranks: int, num_stages: int) -> tuple[_Entry, ...]:
    if isinstance(given, kind):
        return (_combine(kind, [(given, num_ranks / num_stages)]),) * num_stages
    entries = tuple(given) if isinstance(given, Iterable) else ()
    if len(entries) not in (num_ranks, num_stages) or not all(isinstance(entry, kind) for entry in entries):
        counts = f"{num_ranks}, one per rank"
        if num_stages != num_ranks:
            counts += f", or {num_stages}, one per stage"
        raise ValueError(f"{name} is {given!r}, expected one {kind.__name__}, or a sequence of {counts}.")
    if len(entries) == num_stages:
        return entries
    length = len(entries) / num_stages
    found = []
    for stage in range(num_stages):
        begin, end = stage * length, (stage + 1) * length
        pieces = range(math.floor(begin + 1e-9), math.ceil(end - 1e-9))
        found.append(_combine(kind, [(entries[i], min(end, i + 1) - max(begin, i)) for i in pieces]))
    return tuple(found)


def _combine(kind: type[_Entry], parts: Sequence[tuple[_Entry, float]]) -> _Entry:
    return kind(**{f.name: sum(weight * getattr(entry, f.name) for entry, weight in parts) for f in fields(kind)})


def durations(costs: PhaseCosts, deferred: bool, split: bool) -> Mapping[Phase, float]:
    """Returns the time of every phase of one stage.

    The rank that runs FF and BF of a split stage computes FE once more, and BF goes back through it too.

    Args:
        costs: The stage's costs.
        deferred: Whether WF and WE are actions of their own.
        split: Whether the stage is split: FF and BF on another rank than FE and BE.
    """
    times = {phase: costs.of(phase) for phase in COMPUTED_PHASES}
    if not deferred:
        for phase, origin in DEFERRED_PHASES.items():
            times[origin] += times[phase]
    if split:
        times[Phase.FF] += costs.fe
        times[Phase.BF] += costs.be + costs.we
    return times


def action_times(schedule: Schedule, costs: Costs) -> Callable[[Phase, int], float]:
    """Returns a function that gives the time of a phase of a stage in a schedule."""
    deferred = not schedule.phases.isdisjoint(DEFERRED_PHASES)
    per_stage = costs_per_stage(costs, schedule.num_ranks, schedule.num_stages)
    table = [durations(entry, deferred, schedule.is_split(stage)) for stage, entry in enumerate(per_stage)]
    return lambda phase, stage: table[stage][phase]


def format_bytes(value: float) -> str:
    """Returns bytes as text with the unit that suits them, in steps of 1000."""
    size, unit = byte_unit(value)
    return f"{value / size:.3g} {unit}"


def byte_unit(value: float) -> tuple[float, str]:
    """Returns the bytes in the unit that suits some bytes, and its name."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((size, unit) for size, unit in units if value >= size), (1.0, "B"))
