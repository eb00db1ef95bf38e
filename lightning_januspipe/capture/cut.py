"""Cut a traced potential into a chain of stages: small boundaries, balanced costs.

Values that depend on no parameter are geometry: cheap, recomputed by every stage that needs them, never sent. The rest,
the body, is cut in execution order. Layer borders are found without being named: they are where little is alive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.program import Node, Program

# A boundary value whose whole computation costs less than this share of a stage's work, such as a trainable radial
# basis, is computed again by the stages that need it, instead of being sent four times.
_CHEAP_SHARE = 0.15
# A cut may carry at most this many times the bytes of the smallest boundary in the middle of the potential: layers
# differ in width by less, while the inside of a layer holds values per edge, tens of times larger.
_BYTES_SLACK = 4.0
# A stage must do at least this share of the mean work, or it is not worth a rank.
_LEAST_SHARE = 0.1
# Where a rank has several stages all cuts are tried, up to this many; of more a local search is made.
_TRIED_CUTS = 20_000


@dataclass(frozen=True)
class Regions:
    """What of a program is what.

    Attributes:
        body: operations that depend on a parameter and lead to the energy or an observable, in execution order.
        geometry: operations of the forward pass that depend on no parameter.
        observables: values of the body that the epilogue reads (per-structure energies, charges, ...).
        epilogue: operations from derivative and observables to the forward's outputs.
        epilogue_parameters: placeholders of the parameters that the epilogue reads itself.
        outputs: positions of the outputs that the epilogue computes; the others are not available after capture.
        derived: those of them that depend on the derivative (forces, stress).
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
    """Measured seconds and bytes of every value of the forward pass, on one example batch."""

    seconds: Mapping[str, float]
    num_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """A chain of stages.

    Attributes:
        bodies: operations of the body owned by each stage.
        replicated: operations of the body that a stage computes again for itself.
        boundaries: values sent from each stage to the next (one fewer than stages).
        costs: estimated seconds of the forward pass of each stage.
        boundary_bytes: bytes of each boundary on the example batch.
    """

    bodies: list[list[str]]
    replicated: list[list[str]]
    boundaries: list[list[str]]
    costs: list[float] = field(default_factory=list)
    boundary_bytes: list[int] = field(default_factory=list)

    @property
    def num_stages(self) -> int:
        return len(self.bodies)


def find_regions(program: Program, read_outputs: Sequence[int]) -> Regions:
    """Classify the operations of a program.

    Args:
        program: the traced potential.
        read_outputs: positions of the outputs that the user's step reads; small ones (at most nine numbers per atom
            or structure) are always kept, for validation steps and callbacks.

    Raises:
        CaptureError: a differentiation input depends on a parameter.
    """
    on_parameter = _dependent(program, set(program.parameters))
    on_gradient = _dependent(program, {program.gradient})
    for name in program.coordinates:
        if name in on_parameter:
            raise CaptureError(
                f"the energy is differentiated with respect to {name!r}, which depends on a parameter; forces have to "
                "be derivatives with respect to positions or strain"
            )
    epilogue: set[str] = set()
    observables: set[str] = set()
    direct: set[str] = set()
    kept = [i for i in range(len(program.outputs)) if i in read_outputs or _is_small(program, program.outputs[i])]
    stack = [program.outputs[i] for i in kept]
    while stack:
        name = stack.pop()
        node = program.by_name[name]
        if name in epilogue or name in observables or name == program.gradient:
            continue
        if node.op == "placeholder":
            if name in program.parameters:
                direct.add(name)
            continue
        if name in on_parameter and name not in on_gradient:
            observables.add(name)
            continue
        epilogue.add(name)
        stack.extend(node.inputs())
    forward = _ancestors(program, [*program.energies, *program.coordinates, *observables])
    operations = [n.name for n in program.nodes if n.op != "placeholder" and n.name in forward]
    return Regions(
        body=[n for n in operations if n in on_parameter],
        geometry=[n for n in operations if n not in on_parameter],
        observables=[n for n in operations if n in observables],
        epilogue=[n.name for n in program.nodes if n.name in epilogue],
        epilogue_parameters=sorted(direct),
        outputs=kept,
        derived=[i for i in kept if program.outputs[i] in on_gradient],
    )


def find_cut(
    program: Program, regions: Regions, profile: Profile, num_stages: int, placement: Sequence[int] | None = None
) -> Cut:
    """The best chain of ``num_stages`` stages.

    Args:
        program: the traced potential.
        regions: its classification.
        profile: measured costs; they have to be the same on every rank, so one rank measures.
        num_stages: how many stages.
        placement: the rank of each stage, if a rank has several: the ranks' work is balanced, not that of the stages.

    Raises:
        CaptureError: the potential has fewer cuttable parts than stages.
    """
    body = regions.body
    seconds = [max(profile.seconds.get(n, 0.0), 1e-9) for n in body]
    prefix = [0.0]
    for s in seconds:
        prefix.append(prefix[-1] + s)
    cheap = _cheap(program, body, seconds, _CHEAP_SHARE * prefix[-1] / num_stages)
    num_bytes = [b for b, _ in _boundaries(program, regions, profile, cheap)]
    candidates = _small_boundaries(prefix, num_bytes)
    positions = _balanced(prefix, num_bytes, candidates, num_stages, placement)
    if positions is None or not _worth(prefix, positions, num_stages):
        most = num_stages - 1
        while most > 1:
            fewer = _balanced(prefix, num_bytes, candidates, most)
            if fewer is not None and _worth(prefix, fewer, most):
                break
            most -= 1
        raise CaptureError(
            f"pipeline_size={num_stages}, but the potential has only {most} cuttable part(s) of comparable cost. Use "
            f"pipeline_size={most} or less, and give the other ranks to data_size."
        )
    return _assemble(program, regions, profile, cheap, positions)


def _dependent(program: Program, roots: set[str]) -> set[str]:
    found = set(roots)
    for node in program.nodes:
        if node.op != "placeholder" and any(i in found for i in node.inputs()):
            found.add(node.name)
    return found


def _ancestors(program: Program, roots: Sequence[str]) -> set[str]:
    found = set(roots)
    for node in reversed(program.nodes):
        if node.name in found:
            found.update(node.inputs())
    return found


def _is_small(program: Program, name: str) -> bool:
    spec = program.by_name[name].spec
    return spec is not None and math.prod(s for s in spec.shape[1:] if isinstance(s, int)) <= 9


def _cheap(program: Program, body: Sequence[str], seconds: Sequence[float], budget: float) -> set[str]:
    """Values of the body that cost next to nothing from the inputs on, or depend on parameters alone."""
    in_body = set(body)
    cost = dict(zip(body, seconds, strict=True))
    on_batch = _dependent(program, set(program.inputs))
    closure: dict[str, frozenset[str] | None] = {}
    cheap: set[str] = set()
    for name in body:
        parts: set[str] | None = {name}
        for source in program.by_name[name].inputs():
            if source in in_body:
                above = closure[source]
                parts = None if parts is None or above is None else parts | above
        batch_free = name not in on_batch
        small = parts is not None and sum(cost[p] for p in parts) <= budget
        closure[name] = frozenset(parts) if parts is not None and (small or batch_free) else None
        if closure[name] is not None:
            cheap.add(name)
    return cheap


def _boundaries(
    program: Program, regions: Regions, profile: Profile, cheap: set[str]
) -> list[tuple[float, frozenset[str]]]:
    """Bytes and values alive after each operation of the body (infinite where they cannot be sent)."""
    index = {n: i for i, n in enumerate(regions.body)}
    last = dict.fromkeys(regions.body, -1)
    for name in regions.body:
        for source in program.by_name[name].inputs():
            if source in last:
                last[source] = index[name]
    ends: list[tuple[float, frozenset[str]]] = []
    alive: set[str] = set()
    for i, name in enumerate(regions.body):
        alive = {n for n in alive if last[n] > i}
        if last[name] > i:
            alive.add(name)
        sent = frozenset(n for n in alive if not _recompute(program.by_name[n], cheap, profile, alive))
        sendable = all(program.by_name[n].spec is not None for n in sent)
        ends.append((float(sum(profile.num_bytes.get(n, 0) for n in sent)) if sendable else math.inf, sent))
    return ends


def _recompute(node: Node, cheap: set[str], profile: Profile, alive: set[str]) -> bool:
    """Whether a boundary value is computed again instead of sent: cheap, and a fair part of what would be sent."""
    if node.name not in cheap:
        return False
    everything = sum(profile.num_bytes.get(n, 0) for n in alive)
    return node.spec is None or profile.num_bytes.get(node.name, 0) * 10 >= everything or len(alive) == 1


def _small_boundaries(prefix: Sequence[float], num_bytes: Sequence[float]) -> list[int]:
    """Positions whose boundary is of the size found at layer borders, not inside layers."""
    total = prefix[-1]
    shares = [p / total for p in prefix[1:]]
    # A long readout ends in one number per atom, far less than any layer border, so two parts have a say.
    parts = [[b for b, s in zip(num_bytes, shares, strict=True) if b > 0 and a <= s <= a + 0.5] for a in (0.1, 0.4)]
    smallest = max((min(p) for p in parts if p), default=min((b for b in num_bytes if b > 0), default=0.0))
    best: dict[int, int] = {}
    for i, b in enumerate(num_bytes[:-1]):
        if 0 < b <= _BYTES_SLACK * smallest:
            bucket = int(200 * shares[i])  # positions half a percent apart are as good as the same
            if bucket not in best or b < num_bytes[best[bucket]]:
                best[bucket] = i
    return sorted(best.values())


def _balanced(
    prefix: Sequence[float],
    num_bytes: Sequence[float],
    candidates: Sequence[int],
    num_stages: int,
    placement: Sequence[int] | None = None,
) -> list[int] | None:
    """Cut positions (index of the last operation of every stage but the last) with the least maximal cost of a rank.

    Evenness of the other stages and the bytes sent decide between cuts whose slowest ranks are nearly equal.
    """
    if num_stages == 1:
        return []
    points = [c for c in candidates if math.isfinite(num_bytes[c])]
    if len(points) < num_stages - 1:
        return None
    total = prefix[-1]
    heaviest = max(num_bytes[c] for c in points)

    def score(cuts: Sequence[int], ranks: Sequence[int]) -> float:
        edges = [0.0, *(prefix[c + 1] for c in cuts)]
        shares = [(b - a) / total for a, b in pairwise(edges)]
        if len(cuts) == num_stages - 1:
            shares.append(1.0 - edges[-1] / total)
        loads: dict[int, float] = {}
        for rank, share in zip(ranks, shares, strict=False):
            loads[rank] = loads.get(rank, 0.0) + share
        sent = sum(num_bytes[c] for c in cuts) / (heaviest * num_stages)
        return max(loads.values()) + 0.1 * sum(x * x for x in shares) + 0.02 * sent

    one_each = range(num_stages)
    if placement is not None and math.comb(len(points), num_stages - 1) <= _TRIED_CUTS:
        every = ([*cuts] for cuts in combinations(points, num_stages - 1))
        worth = [cuts for cuts in every if _worth(prefix, cuts, num_stages)]
        return min(worth, key=lambda cuts: score(cuts, placement), default=None)
    best = {c: [c] for c in points}
    for _ in range(num_stages - 2):
        options = {c: [[*cuts, c] for b, cuts in best.items() if b < c] for c in points}
        best = {c: min(o, key=lambda cuts: score(cuts, one_each)) for c, o in options.items() if o}
    found = min(best.values(), key=lambda cuts: score(cuts, one_each), default=None)
    if found is None or placement is None:
        return found
    while True:  # from even stages to even ranks, one cut at a time
        moved = [[*found[:i], p, *found[i + 1 :]] for i in range(len(found)) for p in points]
        moved = [m for m in moved if all(a < b for a, b in pairwise(m)) and _worth(prefix, m, num_stages)]
        better = min(moved, key=lambda cuts: score(cuts, placement), default=found)
        if score(better, placement) >= score(found, placement):
            return found
        found = better


def _worth(prefix: Sequence[float], positions: Sequence[int], num_stages: int) -> bool:
    """Whether every stage does a fair share of the work."""
    edges = [0.0, *(prefix[p + 1] for p in positions), prefix[-1]]
    return min(b - a for a, b in pairwise(edges)) >= _LEAST_SHARE * prefix[-1] / num_stages


def _assemble(program: Program, regions: Regions, profile: Profile, cheap: set[str], positions: Sequence[int]) -> Cut:
    """The stages for given cut positions: who owns, who computes again, what is sent on.

    A value needed two stages later is sent through the stage between.
    """
    edges = [0, *(p + 1 for p in positions), len(regions.body)]
    bodies = [regions.body[a:b] for a, b in pairwise(edges)]
    owner = {n: s for s, names in enumerate(bodies) for n in names}
    ends = _boundaries(program, regions, profile, cheap)
    boundaries = [sorted(ends[p][1], key=regions.body.index) for p in positions]
    replicated: list[list[str]] = []
    for stage, names in enumerate(bodies):
        received = set(boundaries[stage - 1]) if stage else set()
        again: set[str] = set()
        wanted = [*names, *(boundaries[stage] if stage < len(boundaries) else [])]
        stack = [i for n in wanted for i in (program.by_name[n].inputs() if owner[n] == stage else [n])]
        while stack:
            name = stack.pop()
            if name in owner and owner[name] < stage and name not in received and name not in again:
                assert name in cheap, f"{name} is neither sent to stage {stage} nor cheap"
                again.add(name)
                stack.extend(program.by_name[name].inputs())
        replicated.append([n for n in regions.body if n in again])
    return Cut(
        bodies=bodies,
        replicated=replicated,
        boundaries=boundaries,
        costs=[sum(profile.seconds.get(n, 0.0) for n in names) for names in bodies],
        boundary_bytes=[sum(profile.num_bytes.get(n, 0) for n in names) for names in boundaries],
    )
