"""Describes what a cut sends and repeats in the field's words: atoms, edges, angles, structures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_januspipe.capture.cut.cut import Profile
from lightning_januspipe.capture.size_names import SizeWords
from lightning_januspipe.capture.stages.staged_potential import StagedPotential, StageOperations
from lightning_januspipe.engine.specs import TensorSpec


@dataclass(frozen=True)
class Sent:
    """Describes one tensor of a boundary, or one repeated value.

    Attributes:
        name: name of the operation that computes it, or of the feature.
        shape: its shape with words for sizes, such as ``("atoms", 3, 64)``.
        dtype: its type, such as ``"float32"``.
        per: what it has an entry for: ``"atom"``, ``"edge"``, ``"structure"``, ..., or ``"batch"``.
        num_bytes: bytes of one such entry.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: str
    per: str
    num_bytes: int

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.shape)) + ("," if len(self.shape) == 1 else "")
        return f"{self.name} ({sizes}) {self.dtype}"


@dataclass(frozen=True)
class Boundary:
    """Lists the tensors that a stage sends to the next one, once in each phase.

    Attributes:
        tensors: the tensors, in the order in which they are sent.
    """

    tensors: tuple[Sent, ...]

    @property
    def bytes_per(self) -> dict[str, int]:
        """Returns the number of bytes for each atom, each edge, ..."""
        found: dict[str, int] = {}
        for tensor in sorted(self.tensors, key=lambda t: _rank(t.per)):
            found[tensor.per] = found.get(tensor.per, 0) + tensor.num_bytes
        return found

    def __str__(self) -> str:
        parts = [f"{size:,} B per {what}" for what, size in self.bytes_per.items()]
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True)
class Repeated:
    """Counts the operations of a stage that other stages run too.

    Attributes:
        geometry: number of operations that depend on no parameter: vectors, distances, basis functions, cutoffs.
        again: number of operations that depend on parameters and that an earlier stage owns.
        values: the repeated values that the stage's own operations read.
        geometry_share: share of geometry in the stage's forward time; None where it was not measured.
        again_share: share of the repeated operations in the stage's forward time; None where it was not measured.
    """

    geometry: int
    again: int
    values: tuple[Sent, ...] = ()
    geometry_share: float | None = None
    again_share: float | None = None


@dataclass(frozen=True)
class SharedParameter:
    """Names a parameter that several stages hold; their gradients are summed.

    Attributes:
        name: its name inside the potential.
        stages: the stages that read it.
        reason: why they do, in words.
    """

    name: str
    stages: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class CutReport:
    """Describes a cut in words.

    Attributes:
        boundaries: the boundary after each stage but the last.
        repeated: the repeated operations of each stage; empty for a potential with stages of its own.
        shared: parameters on several stages.
        defined: word for a size, such as ``"edge"`` -> the input that has this size.
    """

    boundaries: tuple[Boundary, ...]
    repeated: tuple[Repeated, ...]
    shared: tuple[SharedParameter, ...]
    defined: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts and lists, for JSON."""
        return {
            "boundaries": [
                {"bytes_per": b.bytes_per, "tensors": [asdict(t) for t in b.tensors]} for b in self.boundaries
            ],
            "repeated": [asdict(r) for r in self.repeated],
            "shared_parameters": [asdict(p) for p in self.shared],
            "defined_by": self.defined,
        }


def report(potential: StagedPotential, profile: Profile | None = None) -> CutReport:
    """Describes what the stages of a potential send, and what they repeat.

    Args:
        potential: the potential in stages.
        profile: measured times of its operations, for shares of forward times.
    """
    words = potential.size_words()
    found = [potential.stage_operations(stage) for stage in range(potential.num_stages)]
    shared = [
        SharedParameter(name, tuple(sorted(stages)), potential.why_shared(name))
        for name, stages in potential.parameter_stages().items()
        if len(stages) > 1
    ]
    repeated = tuple(_repeated(of_stage, profile, words) for of_stage in found if of_stage is not None)
    return CutReport(_boundaries(potential, words), repeated, tuple(shared), dict(words.defined_by))


def summary(potential: StagedPotential) -> str:
    """Returns the boundaries in a few words, such as ``boundaries of 512 B per atom``; equal ones once."""
    return describe_boundaries(_boundaries(potential, potential.size_words()))


def describe_boundaries(found: Sequence[Boundary]) -> str:
    """Returns what :func:`summary` says about these boundaries."""
    if not found:
        return "no boundary"
    sizes = [str(boundary) for boundary in found]
    words = sizes[0] if len(set(sizes)) == 1 else ", ".join(sizes)
    return f"{'boundaries' if len(found) > 1 else 'a boundary'} of {words}"


def _rank(per: str) -> tuple[int, str]:
    known = ("atom", "edge", "undirected edge", "angle")
    return (known.index(per), "") if per in known else (len(known), per)


def _boundaries(potential: StagedPotential, words: SizeWords) -> tuple[Boundary, ...]:
    return tuple(
        Boundary(tuple(_sent(name, spec, words) for name, spec in potential.boundary(stage)))
        for stage in range(potential.num_stages - 1)
    )


def _sent(name: str, spec: TensorSpec, words: SizeWords) -> Sent:
    num_bytes = spec.dtype.itemsize * math.prod(s for s in spec.shape if isinstance(s, int))
    return Sent(name, words.shape(spec), str(spec.dtype).removeprefix("torch."), words.per(spec), num_bytes)


def _repeated(of_stage: StageOperations, profile: Profile | None, words: SizeWords) -> Repeated:
    every = [*of_stage.geometry, *of_stage.repeated, *of_stage.own]
    return Repeated(
        len(of_stage.geometry),
        len(of_stage.repeated),
        tuple(_sent(name, spec, words) for name, spec in of_stage.repeated_values),
        _share(profile, of_stage.geometry, every),
        _share(profile, of_stage.repeated, every),
    )


def _share(profile: Profile | None, part: Sequence[str], whole: Sequence[str]) -> float | None:
    if profile is None:
        return None
    total = sum(profile.seconds.get(n, 0.0) for n in whole)
    return sum(profile.seconds.get(n, 0.0) for n in part) / total if total else 0.0
