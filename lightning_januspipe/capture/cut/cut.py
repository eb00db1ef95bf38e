"""Cuts a captured program into a chain of stages with small boundaries and balanced costs.

Values that depend on no parameter are geometry: cheap, computed by every stage that needs them, and never sent. All
other operations, the body, are cut in execution order. Layer borders are found without any names: they are the places
where few bytes are alive.

Which values a cut sends, which a stage computes again, and how many stages there can be follows from sizes alone.
Measured times only decide which of the possible cuts is taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lightning_januspipe.capture.cut.cut_points import BORDER_COST, best_cuts, find_cut_points, most_parts
from lightning_januspipe.capture.cut.reorder import arranged, num_sums, traffic
from lightning_januspipe.capture.trace.graph_walks import (
    alive_after_each,
    ancestors,
    ancestors_of_each,
    descendants,
    operations,
)
from lightning_januspipe.capture.trace.program import Node, Program, symbols_in
from lightning_januspipe.errors import CaptureError, TooFewParts

# A value that takes more than this share of the whole work is never repeated: an eighth of the work, repeated on eight
# stages, doubles their work.
_MOST_REPEATED = 0.125


@dataclass(frozen=True)
class Regions:
    """Sorts the operations of a program by the part that they play in a pipeline.

    Attributes:
        body: operations that depend on a parameter and lead to the energy or an observable, in execution order.
        geometry: operations of the forward pass that depend on no parameter.
        observables: values of the body that the epilogue reads (per-structure energies, charges, ...).
        epilogue: operations from derivative and observables to the forward's outputs.
        epilogue_parameters: placeholders of the parameters that the epilogue reads itself.
        outputs: positions of the outputs that the epilogue computes; other outputs are not available after capture.
        derived: positions of the computed outputs that depend on the derivative (forces, stress).
    """

    body: list[str]
    geometry: list[str]
    observables: list[str]
    epilogue: list[str]
    epilogue_parameters: list[str]
    outputs: list[int]
    derived: list[int]


@dataclass(frozen=True)
class Profile:
    """Holds the measurements of a program on one example batch.

    Attributes:
        seconds: time to compute each value of the forward pass.
        num_bytes: size of each value of the forward pass.
        sizes: values of the size expressions in shapes.
    """

    seconds: Mapping[str, float]
    num_bytes: Mapping[str, int]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Describes a chain of stages.

    Attributes:
        bodies: operations of the body that each stage owns.
        replicated: operations of the body that an earlier stage owns, and that each stage computes again for itself.
        boundaries: values sent from each stage to the next (one fewer than stages).
        costs: estimated seconds of the forward pass of each stage, geometry not counted.
        boundary_bytes: bytes of each boundary on the example batch.
        sizes: values of the size expressions in shapes, on the example batch.
    """

    bodies: list[list[str]]
    replicated: list[list[str]]
    boundaries: list[list[str]]
    costs: list[float] = field(default_factory=list)
    boundary_bytes: list[int] = field(default_factory=list)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        """Returns the number of stages."""
        return len(self.bodies)


def find_regions(program: Program, read_outputs: Sequence[int]) -> Regions:
    """``Program -> Regions``: classifies the operations of a program.

    Args:
        program: the captured program.
        read_outputs: positions of the outputs that the user's step reads. Outputs with at most nine numbers per atom or
            structure are always kept, for validation steps and callbacks.

    Raises:
        CaptureError: a differentiation input depends on a parameter.
    """
    on_parameter = descendants(program, program.parameters)
    on_gradient = descendants(program, [program.gradient])
    for name in program.coordinates:
        if name in on_parameter:
            raise CaptureError(
                f"the energy is differentiated with respect to {name!r}, which depends on a parameter; forces have to "
                "be derivatives with respect to positions or strain"
            )
    kept = [i for i in range(len(program.outputs)) if i in read_outputs or _is_small(program, program.outputs[i])]
    wanted = [program.outputs[i] for i in kept]
    of_forward = set(operations(program, on_parameter - on_gradient))
    after = ancestors(program, wanted, given={program.gradient, *of_forward})
    read = {*wanted, *(i for name in after for i in program.by_name[name].inputs())}
    observables = [n for n in operations(program, of_forward) if n in read]
    forward = operations(program, ancestors(program, [*program.energies, *program.coordinates, *observables]))
    return Regions(
        body=[n for n in forward if n in on_parameter],
        geometry=[n for n in forward if n not in on_parameter],
        observables=observables,
        epilogue=operations(program, after),
        epilogue_parameters=sorted(after & program.parameters.keys()),
        outputs=kept,
        derived=[i for i in kept if program.outputs[i] in on_gradient],
    )


def find_cut(
    program: Program, regions: Regions, profile: Profile, num_stages: int, placement: Sequence[int] | None = None
) -> Cut:
    """``Program, Regions, Profile -> Cut``: finds the best chain of ``num_stages`` stages.

    Args:
        program: the captured program.
        regions: its classification.
        profile: measured costs; they have to be the same on every rank, so one rank measures.
        num_stages: length of the chain.
        placement: the rank of each stage, if a rank has several stages; then the work of the ranks is balanced. None
            for one stage on each rank.

    Raises:
        TooFewParts: the potential has fewer cuttable parts than stages.
    """
    fixed = {*regions.observables, *program.energies}
    work = traffic(program, regions.body, profile.num_bytes)
    free = _repeatable(program, regions.body, fixed, work, profile.num_bytes)
    order = arranged(program, regions.body, free, fixed, profile.num_bytes)
    ends = _boundaries(program, order, free, profile.num_bytes)
    of_order = [work[name] for name in order]
    places = find_cut_points(of_order, [(end.num_bytes, end.num_rows) for end in ends])
    points = places.points
    most = max(places.num_layers, most_parts(_StageCosts(program, order, free, of_order, points), points, len(order)))
    num_ranks = num_stages if placement is None else len(set(placement))
    if num_ranks > most or num_stages > len(points) + 1:
        raise TooFewParts(
            f"pipeline_size={num_ranks}, but the potential has only {most} cuttable part(s) of comparable cost. Use "
            f"pipeline_size={most} or less, and give the other ranks to data_size.",
            most=most,
        )
    seconds = _StageCosts(program, order, free, [max(profile.seconds.get(n, 0.0), 1e-9) for n in order], points)
    sent = [end.num_bytes / max(places.border, 1.0) for end in ends]
    positions = best_cuts(seconds, points, sent, num_stages, placement)
    return _assemble(program, order, free, [ends[p].sent for p in positions], profile, positions)


def _is_small(program: Program, name: str) -> bool:
    spec = program.by_name[name].spec
    return spec is not None and math.prod(s for s in spec.shape[1:] if isinstance(s, int)) <= 9


def _repeatable(
    program: Program,
    body: Sequence[str],
    fixed: Collection[str],
    work: Mapping[str, float],
    num_bytes: Mapping[str, int],
) -> set[str]:
    """Returns the operations that every stage may compute for itself instead of receiving their values.

    These are operations on parameters alone, and local ones that cost little compared with sending their values.
    """
    whole = sum(work.values()) or 1.0
    closure = ancestors_of_each(program, [name for name, sums in num_sums(program, body).items() if sums == 0])
    share = {name: sum(work[part] for part in parts) / whole for name, parts in closure.items()}
    on_batch = descendants(program, program.inputs)
    of_parameters = {name for name in body if name not in on_batch}

    def together(names: Collection[str]) -> set[str]:
        return of_parameters.union(*(closure[name] for name in names))

    cheap = together([name for name in closure if share[name] <= _MOST_REPEATED])
    order = arranged(program, body, cheap, fixed, num_bytes)
    ends = _boundaries(program, order, cheap, num_bytes)
    border = find_cut_points([work[name] for name in order], [(end.num_bytes, end.num_rows) for end in ends]).border

    def is_worth(name: str) -> bool:
        borders = num_bytes.get(name, 0) / max(border, 1.0)
        return share[name] <= min(_MOST_REPEATED, BORDER_COST * borders)

    return together([name for name in closure if is_worth(name)])


@dataclass(frozen=True)
class _End:
    """Describes a place between two operations where the chain may be cut.

    Attributes:
        sent: the values that are alive there, and would be sent.
        num_bytes: their size; infinite where there can be no cut.
        num_rows: the largest number of rows of one of these values: of atoms or edges, say.
    """

    sent: frozenset[str]
    num_bytes: float
    num_rows: int


def _boundaries(
    program: Program, order: Sequence[str], free: Collection[str], num_bytes: Mapping[str, int]
) -> list[_End]:
    """Returns for each operation what is sent if the cut comes right after it."""
    rows = {name: _num_rows(program.by_name[name], num_bytes.get(name, 0)) for name in order}
    known = set(program.symbols)
    ends: list[_End] = []
    for name, alive in zip(order, alive_after_each(program, order), strict=True):
        # A free operation belongs to the stage that uses it first: it is not sent, and no cut comes right after it.
        sent = frozenset(n for n in alive if n not in free)
        is_sendable = name not in free and all(_has_known_shape(program.by_name[n], known) for n in sent)
        size = float(sum(num_bytes.get(n, 0) for n in sent)) if is_sendable else math.inf
        ends.append(_End(sent, size, max((rows[n] for n in sent), default=0)))
    return ends


def _has_known_shape(node: Node, symbols: Collection[str]) -> bool:
    """Tells whether a rank knows the shape of a value before it receives it."""
    return node.spec is not None and all(symbols_in(size) <= set(symbols) for size in node.spec.shape)


def _num_rows(node: Node, num_bytes: int) -> int:
    """Returns the number of rows of a value: the product of its symbolic sizes."""
    if node.spec is None:
        return 0
    constant = math.prod(s for s in node.spec.shape if isinstance(s, int))
    return num_bytes // max(node.spec.dtype.itemsize * constant, 1)


class _StageCosts:
    """Computes the cost of a stage that owns a range of operations, those that it computes again included.

    Args:
        program: the captured program.
        order: all operations of the body.
        free: operations that a stage computes again where it needs them and does not own them.
        cost: cost of each operation.
        points: positions after which the chain may be cut.
    """

    def __init__(
        self,
        program: Program,
        order: Sequence[str],
        free: Collection[str],
        cost: Sequence[float],
        points: Sequence[int],
    ) -> None:
        self._sums = [0.0, *accumulate(cost)]
        index = {name: i for i, name in enumerate(order)}
        reads = [[index[i] for i in program.by_name[name].inputs() if i in free] for name in order]
        readers = [i for i, sources in enumerate(reads) if sources]
        self._again: dict[int, list[float]] = {}
        for start in (p + 1 for p in points):
            found: set[int] = set()
            spent = [0.0] * len(order)
            for reader in readers:
                stack = list(reads[reader]) if reader >= start else []
                while stack:
                    source = stack.pop()
                    if source < start and source not in found:
                        found.add(source)
                        spent[reader] += cost[source]
                        stack.extend(reads[source])
            self._again[start] = [0.0, *accumulate(spent)]

    def __call__(self, start: int, end: int) -> float:
        """Returns the cost of a stage that owns the operations from ``start`` to before ``end``."""
        again = self._again[start][end] if start else 0.0
        return self._sums[end] - self._sums[start] + again


def _assemble(
    program: Program,
    order: Sequence[str],
    free: Collection[str],
    sent: Sequence[Collection[str]],
    profile: Profile,
    positions: Sequence[int],
) -> Cut:
    """Returns the chain with given cuts: the operations that each stage owns and repeats, and the values that it sends.

    A value that is needed two stages later is sent through the stage between.
    """
    bodies = [list(order[a:b]) for a, b in pairwise([0, *(p + 1 for p in positions), len(order)])]
    owner = {n: s for s, names in enumerate(bodies) for n in names}
    replicated: list[list[str]] = []
    for stage, names in enumerate(bodies):
        earlier = {n for n in free if owner[n] < stage}
        inputs = {i for n in names for i in program.by_name[n].inputs()}
        again = ancestors(program, inputs & earlier, given=program.by_name.keys() - earlier)
        replicated.append([n for n in order if n in again])
    boundaries = [[n for n in order if n in names] for names in sent]
    return Cut(
        bodies=bodies,
        replicated=replicated,
        boundaries=boundaries,
        costs=[
            sum(profile.seconds.get(n, 0.0) for n in [*names, *again])
            for names, again in zip(bodies, replicated, strict=True)
        ],
        boundary_bytes=[sum(profile.num_bytes.get(n, 0) for n in names) for names in boundaries],
        sizes=profile.sizes,
    )
