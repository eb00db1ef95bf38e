"""What a cut sends and what it computes again, in the field's words: atoms, edges, angles, structures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_januspipe.capture.cut.cut import Profile
from lightning_januspipe.capture.size_names import Words, words_of
from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.engine.specs import TensorSpec


@dataclass(frozen=True)
class Sent:
    """One tensor of a boundary.

    Attributes:
        name: of the operation that computes it, or of the feature.
        shape: with words for sizes, such as ``("atoms", 3, 64)``.
        dtype: such as ``"float32"``.
        per: what it has an entry for: ``"atom"``, ``"edge"``, ``"structure"``, ..., or ``"batch"``.
        num_bytes: of one such entry.
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
    """What a stage passes on to the next one, once in each phase.

    Attributes:
        tensors: in the order in which they are sent.
    """

    tensors: tuple[Sent, ...]

    @property
    def bytes_per(self) -> dict[str, int]:
        """Bytes for each atom, edge, ..."""
        found: dict[str, int] = {}
        for tensor in sorted(self.tensors, key=lambda t: _rank(t.per)):
            found[tensor.per] = found.get(tensor.per, 0) + tensor.num_bytes
        return found

    def __str__(self) -> str:
        parts = [f"{size:,} B per {what}" for what, size in self.bytes_per.items()]
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True)
class Repeated:
    """What a stage computes that others compute too.

    Attributes:
        geometry: operations that depend on no parameter: vectors, distances, basis functions, cutoffs.
        again: operations that depend on parameters and that an earlier stage owns.
        values: of these the ones that the stage's own operations read.
        geometry_share: of the stage's forward time; None where it was not measured.
        again_share: likewise.
    """

    geometry: int
    again: int
    values: tuple[Sent, ...] = ()
    geometry_share: float | None = None
    again_share: float | None = None


@dataclass(frozen=True)
class SharedParameter:
    """A parameter that several stages hold; their gradients are summed.

    Attributes:
        name: inside the potential.
        stages: that read it.
        reason: why they do.
    """

    name: str
    stages: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class CutReport:
    """A cut in words.

    Attributes:
        boundaries: one fewer than stages.
        repeated: of each stage; empty where a potential divides itself.
        shared: parameters on several stages.
        defined: which input defines what edges, angles and the like are.
    """

    boundaries: tuple[Boundary, ...]
    repeated: tuple[Repeated, ...]
    shared: tuple[SharedParameter, ...]
    defined: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "boundaries": [
                {"bytes_per": b.bytes_per, "tensors": [asdict(t) for t in b.tensors]} for b in self.boundaries
            ],
            "repeated": [asdict(r) for r in self.repeated],
            "shared_parameters": [asdict(p) for p in self.shared],
            "defined_by": self.defined,
        }


def report(potential: StagedPotential, profile: Profile | None = None) -> CutReport:
    """Describe what the stages of a potential send, and what they repeat.

    Args:
        potential: in stages.
        profile: measured times of its operations, for shares of forward times.
    """
    if isinstance(potential, ExplicitPotential):
        return _of_parts(potential)
    assert isinstance(potential, CapturedPotential)
    return _of_program(potential, profile)


def summary(potential: StagedPotential) -> str:
    """The boundaries in a few words, such as ``boundaries of 512 bytes per atom``."""
    found = report(potential).boundaries
    if not found:
        return "no boundary"
    kinds = [" and ".join(f"{size:,} bytes per {what}" for what, size in b.bytes_per.items()) for b in found]
    different = list(dict.fromkeys(kinds))
    if len(different) > 1 and all(set(b.bytes_per) == {"atom"} for b in found):
        sizes = ", ".join(f"{b.bytes_per['atom']:,}" for b in found)
        return f"boundaries of {sizes} bytes per atom"
    return ("boundaries of " if len(found) > 1 else "a boundary of ") + "; ".join(different)


def sent(potential: StagedPotential, stage: int) -> list[tuple[str, TensorSpec]]:
    """Names and specs of what a stage passes on to the next one."""
    if isinstance(potential, ExplicitPotential):
        return list(potential.features[potential.bounds[stage + 1] - 1].items())
    assert isinstance(potential, CapturedPotential)
    found = []
    for name in potential.cut.boundaries[stage]:
        spec = potential.program.by_name[name].spec
        assert spec is not None, f"{name} is sent, but is no tensor"
        found.append((name, spec))
    return found


def _rank(per: str) -> tuple[int, str]:
    known = ("atom", "edge", "undirected edge", "angle")
    return (known.index(per), "") if per in known else (len(known), per)


def _boundaries(potential: StagedPotential, words: Words) -> tuple[Boundary, ...]:
    return tuple(
        Boundary(tuple(_sent(name, spec, words) for name, spec in sent(potential, stage)))
        for stage in range(potential.num_stages - 1)
    )


def _sent(name: str, spec: TensorSpec, words: Words) -> Sent:
    shape = tuple(s if isinstance(s, int) else words.plural(s) for s in spec.shape)
    size = spec.dtype.itemsize
    for s in spec.shape:
        size *= s if isinstance(s, int) else 1
    return Sent(name, shape, str(spec.dtype).removeprefix("torch."), words.per(spec), size)


def _of_parts(potential: ExplicitPotential) -> CutReport:
    words = words_of(potential)
    shared = [
        SharedParameter(name, tuple(sorted(stages)), "read by parts of these stages")
        for name, stages in potential.parameter_stages().items()
        if len(stages) > 1
    ]
    return CutReport(_boundaries(potential, words), (), tuple(shared), words.defined())


def _of_program(captured: CapturedPotential, profile: Profile | None) -> CutReport:
    program, cut = captured.program, captured.cut
    words = words_of(captured)
    needed = [_needed(captured, stage) for stage in range(cut.num_stages)]
    repeated = []
    for stage, (names, again) in enumerate(zip(cut.bodies, cut.replicated, strict=True)):
        geometry = needed[stage] & set(captured.regions.geometry)
        own = needed[stage] & set(names)
        read = {i for n in own for i in program.by_name[n].inputs()} & set(again)
        specs = [(n, program.by_name[n].spec) for n in again if n in read]
        repeated.append(
            Repeated(
                len(geometry),
                len(again),
                tuple(_sent(n, spec, words) for n, spec in specs if spec is not None),
                _share(profile, geometry, [*geometry, *again, *own]),
                _share(profile, again, [*geometry, *again, *own]),
            )
        )
    return CutReport(_boundaries(captured, words), tuple(repeated), _shared(captured, needed, words), words.defined())


def _needed(captured: CapturedPotential, stage: int) -> set[str]:
    """Operations that a stage runs."""
    cut, program = captured.cut, captured.program
    own, received = set(cut.bodies[stage]), set(cut.boundaries[stage - 1]) if stage else set()
    passed = cut.boundaries[stage] if stage < len(cut.boundaries) else []
    wanted = [*program.energies, *captured.regions.observables, *passed]
    stack = [*(n for n in wanted if n in own), *program.coordinates]
    found: set[str] = set()
    while stack:
        name = stack.pop()
        if name not in found and name not in received and program.by_name[name].op != "placeholder":
            found.add(name)
            stack.extend(program.by_name[name].inputs())
    return found


def _share(profile: Profile | None, part: Collection[str], whole: Sequence[str]) -> float | None:
    if profile is None:
        return None
    total = sum(profile.seconds.get(n, 0.0) for n in whole)
    return sum(profile.seconds.get(n, 0.0) for n in part) / total if total else 0.0


def _shared(captured: CapturedPotential, needed: Sequence[set[str]], words: Words) -> tuple[SharedParameter, ...]:
    """Parameters on several stages, each with the reason that concerns most of them."""
    program, cut = captured.program, captured.cut
    placeholders: Mapping[str, str] = {name: placeholder for placeholder, name in program.parameters.items()}
    after = {program.parameters[p] for p in captured.regions.epilogue_parameters}
    found = []
    for name, stages in captured.parameter_stages().items():
        if len(stages) < 2:
            continue
        readers = [n.name for n in program.nodes if n.op != "placeholder" and placeholders[name] in n.inputs()]
        if name in after:
            reason = "read after the derivative, on every rank"
        elif name in captured.step_parameters:
            reason = "read by the step itself, on every rank"
        elif any(r in again for again in cut.replicated for r in readers):
            reason = f"{_computed(captured, readers, words)} computed where needed"
        elif sum(any(r in names for r in readers) for names in needed) > 1:
            reason = "used by layers of these stages"
        else:
            reason = "a constant made of it is computed where needed"
        found.append(SharedParameter(name, tuple(sorted(stages)), reason))
    return tuple(found)


def _computed(captured: CapturedPotential, readers: Sequence[str], words: Words) -> str:
    """The shapes of what repeated operations that read a parameter end in."""
    program, cut = captured.program, captured.cut
    repeated = {n for again in cut.replicated for n in again}
    reached = {r for r in readers if r in repeated}
    ends: dict[str, None] = {}
    for node in program.nodes:
        if any(i in reached for i in node.inputs()):
            if node.name in repeated:
                reached.add(node.name)
            else:
                for i in node.inputs():
                    spec = program.by_name[i].spec
                    if i in reached and spec is not None:
                        ends[f"({', '.join(str(s) for s in _sent(i, spec, words).shape)})"] = None
    shapes = list(ends)
    return " and ".join(shapes[:2]) + (", ..." if len(shapes) > 2 else "") + (" is" if len(shapes) == 1 else " are")
