"""Exchanges between graph ranks, put into a captured program where they are needed.

Every rank of a stage runs the same operations on its own rows. What a value is to the ranks follows from its operands:

==============  ====================================================  =================================
kind            value                                                 cotangent on each rank
==============  ====================================================  =================================
``OWN``         each rank has its own rows                            that of these rows
``REPLICATED``  all ranks have the same (energies, strain)            all ranks have the same, whole one
``PARTIAL``     all ranks have the same (parameters)                  a part; all of them are summed later
==============  ====================================================  =================================

An exchange stands where a value has to become another kind, or rows of other ranks are read or written. Each is a
linear map whose backward pass is its transpose, so that it is right in all four phases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.program import Node, Ref, refs, replace_refs
from lightning_januspipe.capture.stages import CapturedPotential
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.graph import operations
from lightning_januspipe.graph.numbers import (
    GATHERING,
    SCATTERING,
    Classes,
    Numbers,
    NumbersOfRows,
    Source,
    Use,
    find_classes,
    require_plain_use,
)

_CONSTANT = re.compile(r"aten\.(new_)?(zeros|ones|full|empty)(_like)?\.|aten\.scalar_tensor\.")
_REPEATING = re.compile(r"aten\.(expand|expand_as|repeat)\.")
_ZEROS = re.compile(r"aten\.(new_)?zeros(_like)?\.")
_CONTRACTING = {
    *("aten.sum.default", "aten.sum.dim_IntList", "aten.mm.default", "aten.bmm.default", "aten.matmul.default"),
    *("aten.dot.default", "aten.einsum.default", "aten.mv.default", "aten.tensordot.default"),
}
"""Operations that sum over rows, and do nothing else with them."""
_MIXING = {
    *("aten.cumsum.default", "aten.flip.default", "aten.roll.default", "aten.sort.default", "aten.argsort.default"),
    *("aten._softmax.default", "aten.softmax.int", "aten._log_softmax.default", "aten.cumprod.default"),
    *("aten.topk.default", "aten.sort.stable", "aten.argsort.stable", "aten.log_softmax.int"),
}
"""Operations along some dimensions that keep their sizes."""
_ADDING = {"aten.index_add.default", "aten.scatter_add.default"}


class Kind(Enum):
    """What a value is to the graph ranks."""

    OWN = auto()
    REPLICATED = auto()
    PARTIAL = auto()


@dataclass(frozen=True)
class Value:
    """Kind of a value; of an ``OWN`` one the class of its rows, their dimension, and how many entries a row takes."""

    kind: Kind
    rows: str = ""
    dim: int = 0
    times: int = 1


_PARTIAL, _REPLICATED = Value(Kind.PARTIAL), Value(Kind.REPLICATED)


@dataclass(frozen=True)
class Localized:
    """A captured potential for several graph ranks.

    Attributes:
        potential: with exchanges; its inputs end with one exchange for each of ``classes.names``.
        classes: what is divided, and by what.
        rows: (position of an input, dimension) -> the class that it has an entry for.
        renumbered: parts of inputs that hold numbers of rows -> the class that they count.
        observables: kinds of the observables.
        derivatives: kinds of the differentiation inputs, and so of the derivative.
        positions: place of the input with positions (N, 3), if it is among the inputs.
        computed: numbers of rows that operations compute from inputs; they are computed for the whole micro-batch, and
            are the last inputs.
        extended: (position, dimension) of the inputs of which the potential also takes rows with the halo, after the
            exchanges: every rank has them, so nothing has to be sent.
    """

    potential: CapturedPotential
    classes: Classes
    rows: dict[tuple[int, int], str]
    renumbered: dict[Source, str]
    observables: tuple[Value, ...]
    derivatives: tuple[Value, ...]
    positions: int | None
    extended: tuple[tuple[int, int], ...]
    computed: tuple[Numbers, ...]


def localize(captured: CapturedPotential) -> Localized:
    """Put exchanges into a captured potential.

    Raises:
        CaptureError: an operation mixes rows in a way that has no exchange here.
    """
    return _Localizer(captured).run()


class _Localizer:
    def __init__(self, captured: CapturedPotential) -> None:
        self._captured, self._program = captured, captured.program
        regions, cut = captured.regions, captured.cut
        forward = {*regions.geometry, *regions.body}
        self._forward = [n.name for n in self._program.nodes if n.name in forward]
        self._found = NumbersOfRows(self._program, self._forward, cut.sizes)
        self._classes = find_classes(self._program, self._found)
        self._divided = self._found.divided = set(self._classes.names)
        self._computed = [n.source.node for n in self._found.numbers if n.source.node and n.of in self._divided]
        self._forward = self._alive()
        require_plain_use(self._program, self._found, self._classes, self._forward)
        self._uses = {(u.node.name, u.dim): u for u in self._found.uses}
        self._known = {n.source for n in self._found.numbers}
        self._owners = {n.source for n in self._classes.owner.values()}
        self._on_parameter = self._dependent(set(self._program.parameters))
        self._on_coordinate = self._dependent(set(self._program.coordinates))
        self._values: dict[str, Value] = {}
        self._sizes: set[str] = set()
        self._new: dict[str, list[Node]] = {}
        self._added: dict[tuple[str, str, str, int], str] = {}
        self._with: dict[str, list[str]] = {}
        self._extended: dict[str, int] = {}
        self._cut = cut

    def run(self) -> Localized:
        """All operations in order; then the program with what was inserted."""
        program = self._program
        self._nodes = {n.name: replace(n) for n in program.nodes}
        forward = set(self._forward)
        for node in program.nodes:
            if node.op == "placeholder" or node.name in self._computed:
                self._values[node.name] = self._of_input(node)
            elif node.name in forward:
                self._values[node.name] = self._visit(self._nodes[node.name])
            if node.name in program.coordinates and self._values[node.name].kind is Kind.PARTIAL:
                self._values[node.name] = _REPLICATED
        for name in self._captured.regions.observables:
            if self._values[name].kind is Kind.PARTIAL:
                self._rename_and_follow(name, operations.count_once)
                self._values[name] = _REPLICATED
        return self._result()

    # -- kinds -------------------------------------------------------------------------------------------------------

    def _of_input(self, node: Node) -> Value:
        is_input = node.name in self._program.inputs or node.name in self._computed
        if not is_input or node.spec is None:
            return _PARTIAL
        return self._rows_of(node.spec, node) or _PARTIAL

    def _rows_of(self, spec: TensorSpec, node: Node) -> Value | None:
        """The one divided dimension of a shape, if there is one."""
        found = []
        for dim, size in enumerate(spec.shape):
            try:
                factor = self._found.factor(size)
            except ValueError as error:
                raise _refused(node, f"makes {error}") from error
            if factor is not None:
                found.append(Value(Kind.OWN, factor[0], dim, factor[1]))
        if len(found) > 1:
            raise _refused(node, "has two dimensions of atoms or edges")
        return found[0] if found else None

    def _visit(self, node: Node) -> Value:
        if self._is_size(node):
            if any(r.name in self._sizes for r in refs(node.args)) or self._is_divided_size(node):
                self._sizes.add(node.name)
            return _PARTIAL
        counted = self._found.counts(node.name)
        if counted is not None and self._found.class_of(counted) in self._divided:
            self._refuse_counting(node)
            return self._rows_of(node.spec, node) or _PARTIAL if node.spec is not None else _PARTIAL
        self._refuse_sizes_as_numbers(node)
        if node.target in SCATTERING:
            written = self._written(node)
            if written is not None:
                return written
        elif node.target in GATHERING:
            self._read(node)
        return self._local(node)

    def _local(self, node: Node) -> Value:
        """An operation on each rank's rows."""
        if _CONSTANT.match(str(node.target)) and node.spec is not None:
            return self._rows_of(node.spec, node) or _PARTIAL
        given = self._operands(node)
        own = [self._values[n] for n in given if self._values[n].kind is Kind.OWN]
        if len({v.rows for v in own}) > 1 and node.target not in GATHERING:
            raise _refused(node, "combines rows of two kinds, atoms with edges, say")
        created = self._rows_of(node.spec, node) if node.spec is not None else None
        if not own:
            if created is not None:
                if _REPEATING.match(str(node.target)) is None and node.target not in GATHERING:
                    raise _refused(node, "makes one row for each atom or edge of something else")
                self._replicate(node, given)
                return created
            is_replicated = any(self._values[n].kind is Kind.REPLICATED for n in given)
            if is_replicated:
                for name in given:
                    if self._values[name].kind is Kind.PARTIAL and name in self._on_parameter:
                        self._operand(node, name, operations.count_once, self._classes.root)
            return _REPLICATED if is_replicated else _PARTIAL
        self._replicate(node, given)
        if node.spec is None:  # several tensors
            return own[0]
        if created is None:
            if node.target not in _CONTRACTING:
                raise _refused(node, "combines all atoms or edges")
            return self._summed(node)
        if created.rows != own[-1].rows and node.target not in GATHERING:
            raise _refused(node, "turns rows of one kind into rows of another")
        self._refuse_mixing(node, own[0])
        return created

    def _operands(self, node: Node) -> list[str]:
        """Values that an operation reads, as the program had them, without sizes."""
        by_name = self._program.by_name
        return [n for n in by_name[node.name].inputs() if n not in self._sizes and not self._is_size(by_name[n])]

    def _summed(self, node: Node) -> Value:
        self._rename_and_follow(node.name, operations.sum_over_ranks)
        return _REPLICATED if self._is_differentiable(node.name) else _PARTIAL

    def _replicate(self, node: Node, given: Sequence[str]) -> None:
        """What is the same on all ranks enters what each does with its own rows: cotangents have to be summed."""
        for name in given:
            if self._values[name].kind is Kind.REPLICATED and self._is_differentiable(name):
                self._operand(node, name, operations.replicate, self._classes.root)

    # -- index operations --------------------------------------------------------------------------------------------

    def _read(self, node: Node) -> None:
        """Rows that are looked up: those of other ranks have to come first."""
        name = str(node.args[0].name)
        value = self._values[name]
        use = self._use(node, value)
        if use is None or use.counts is not None or use.source in self._owners:
            return
        if name in self._program.inputs and not self._is_differentiable(name):
            self._extended[name] = value.dim
            node.args = (Ref(_extended(name)), *node.args[1:])
            return
        extended = operations.with_room if self._is_zero(name) else operations.gather_halo
        self._operand(node, name, extended, value.rows, value.dim)

    def _use(self, node: Node, value: Value) -> Use | None:
        """The index along the rows of what is read or written, which has to come from an input."""
        if value.kind is not Kind.OWN:
            return None
        use = self._uses.get((node.name, value.dim))
        if use is None:
            return None
        is_known = use.source in self._known or self._found.class_of(use.counts or "") == value.rows
        if not is_known or value.times > 1:
            raise _refused(node, "looks atoms or edges up by numbers that it computes")
        return use

    def _written(self, node: Node) -> Value | None:
        """Rows that are summed up: what belongs to rows of other ranks goes there. None for what stays on the rank."""
        name = str(node.args[0].name)
        value = self._values[name]
        dim = None if value.kind is not Kind.OWN else value.dim
        given = [n for n in self._operands(node) if n != name and self._values[n].kind is Kind.OWN]
        if dim is not None:
            use = self._use(node, value)
            if use is None:
                return None
            if use.counts is not None or use.source in self._owners:
                self._replicate(node, self._operands(node))
                return value
            if not _adds(node) and not _is_largest(node):
                raise _refused(node, "writes rows that belong to other ranks")
            self._replicate(node, self._operands(node))
            room, joined = (operations.with_room, operations.sum_halo)
            if _is_largest(node):
                room, joined = (operations.with_low_room, operations.max_halo)
            self._operand(node, name, room, value.rows, value.dim)
            self._rename_and_follow(node.name, joined, value.rows, value.dim)
            return value
        if not given:
            return None
        if not _adds(node):
            raise _refused(node, "combines all atoms or edges, but does not sum")
        if not self._is_zero(name):
            raise _refused(node, "sums atoms or edges into values that are not zero at first")
        self._replicate(node, self._operands(node))
        return self._summed(node)

    def _is_zero(self, name: str) -> bool:
        node = self._program.by_name[name]
        target = str(node.target)
        if target.startswith(("aten.expand.", "aten.view.", "aten.clone.")):
            return self._is_zero(node.args[0].name)
        if target.startswith(("aten.full.", "aten.new_full.", "aten.full_like.")):
            return node.args[2 if "new_full" in target else 1] == 0
        return _ZEROS.match(target) is not None

    # -- refusals ----------------------------------------------------------------------------------------------------

    def _is_size(self, node: Node) -> bool:
        if node.op == "placeholder" or node.spec is not None:
            return False
        target = str(node.target)
        return target.startswith("aten.sym_") or (
            not target.startswith("aten.") and getattr(node.target, "__name__", "") != "getitem"
        )

    def _is_divided_size(self, node: Node) -> bool:
        if node.target != "aten.sym_size.int":
            return False
        value = self._values.get(node.args[0].name)
        spec = self._program.by_name[node.args[0].name].spec
        if value is None or value.kind is not Kind.OWN or spec is None:
            return False
        return node.args[1] % len(spec.shape) == value.dim

    def _refuse_sizes_as_numbers(self, node: Node) -> None:
        """A rank knows the number of its own rows only, which is right in shapes and wrong in a mean."""
        plain = [a.name for a in (*node.args, *node.kwargs.values()) if isinstance(a, Ref) and a.name in self._sizes]
        if plain and not str(node.target).startswith(("aten.slice.", "aten.narrow.")):
            raise _refused(node, "computes with the number of atoms or edges")

    def _refuse_counting(self, node: Node) -> None:
        """Rows are counted on each rank for itself, which is right for looking them up, and for nothing else."""
        for name in self._forward:
            user = self._program.by_name[name]
            if node.name not in user.inputs() or self._found.counts(name) is not None:
                continue
            uses = [u for u in self._found.uses if u.node.name == name and u.index == node.name]
            if not uses:
                raise _refused(node, "computes with the numbers of atoms or edges")

    def _refuse_mixing(self, node: Node, value: Value) -> None:
        if node.target in _MIXING:
            place = 2 if node.target == "aten.roll.default" else 1
            dims = node.args[place] if len(node.args) > place else None
            num = len(node.spec.shape) if node.spec is not None else 1
            dims = [dims] if isinstance(dims, int) else dims
            if not isinstance(dims, (list, tuple)) or value.dim in [d % num for d in dims]:
                raise _refused(node, "combines all atoms or edges")

    # -- insertion ---------------------------------------------------------------------------------------------------

    def _operand(self, node: Node, name: str, function: Callable[..., Any], rows: str, dim: int = 0) -> None:
        """Give ``node`` what ``function`` makes of its operand ``name``."""
        key = (name, function.__name__, rows, dim)
        if key not in self._added:
            added = f"{name}__{function.__name__}" + (f"_{dim}" if dim else "")
            self._added[key] = added
            spec = self._program.by_name[name].spec
            extra = Node(added, "call_function", function, (Ref(name), Ref(_exchange(rows)), dim), {}, spec)
            self._new.setdefault(node.name, []).append(extra)
        added = self._added[key]
        self._with.setdefault(node.name, []).append(added)

        def swapped(other: str) -> Ref:
            return Ref(added if other == name else other)

        if node.target in GATHERING or node.target in SCATTERING:  # the indices are other operands
            node.args = (
                (swapped(node.args[0].name), *node.args[1:])
                if node.args[0].name == name
                else tuple(replace_refs(a, swapped) for a in node.args)
            )
        else:
            node.args, node.kwargs = replace_refs(node.args, swapped), replace_refs(node.kwargs, swapped)

    def _rename_and_follow(self, name: str, function: Callable[..., Any], rows: str = "", dim: int = 0) -> None:
        """Let ``function`` of a value take its place."""
        node = self._nodes[name]
        part = f"{name}__part"
        raw = replace(node, name=part)
        last = Node(
            name, "call_function", function, (Ref(part), Ref(_exchange(rows or self._classes.root)), dim), {}, node.spec
        )
        self._nodes[name] = last
        self._new.setdefault(name, []).append(raw)
        self._with.setdefault(name, []).append(part)

    def _result(self) -> Localized:
        captured, program = self._captured, self._program
        nodes = []
        added = [*(_exchange(c) for c in self._classes.names), *map(_extended, self._extended), *self._computed]
        placeholders = [Node(e, "placeholder", e, (), {}, None) for e in added]
        is_first = True
        for node in program.nodes:
            if node.name in self._computed:
                continue
            if node.op != "placeholder" and is_first:
                nodes += placeholders
                is_first = False
            nodes += self._new.get(node.name, [])
            nodes.append(self._nodes[node.name])
        localized = replace(program, nodes=nodes, inputs=[*program.inputs, *added])
        regions, cut = captured.regions, captured.cut
        potential = replace(
            captured,
            program=localized,
            regions=replace(regions, body=self._longer(regions.body), geometry=self._longer(regions.geometry)),
            cut=replace(
                cut,
                bodies=[self._longer(b) for b in cut.bodies],
                replicated=[self._longer(r) for r in cut.replicated],
            ),
        )
        rows = {
            (position, value.dim): value.rows
            for position, name in enumerate(program.inputs)
            for value in [self._values[name]]
            if value.kind is Kind.OWN
        }
        return Localized(
            potential=potential,
            classes=self._classes,
            rows=rows,
            renumbered={n.source: n.of for n in self._found.numbers if n.of in self._divided and not n.source.node},
            computed=tuple(n for n in self._found.numbers if n.of in self._divided and n.source.node),
            observables=tuple(self._values[n] for n in regions.observables),
            derivatives=tuple(self._values[n] for n in program.coordinates),
            positions=self._positions(),
            extended=tuple((program.inputs.index(name), dim) for name, dim in self._extended.items()),
        )

    def _longer(self, names: Sequence[str]) -> list[str]:
        found: list[str] = []
        for name in names:
            if name in self._computed:
                continue
            found += [n for n in self._with.get(name, []) if n not in found]
            found.append(name)
        return found

    def _alive(self) -> list[str]:
        """Operations that are still needed where computed numbers are inputs."""
        regions, program = self._captured.regions, self._program
        alive = {*program.energies, *program.coordinates, *regions.observables}
        forward = set(self._forward)
        for node in reversed(program.nodes):
            if node.name in alive and node.name in forward and node.name not in self._computed:
                alive.update(node.inputs())
        return [n for n in self._forward if n in alive and n not in self._computed]

    def _positions(self) -> int | None:
        """The input that the first differentiation input of atoms is made from, if it has its shape."""
        for name in self._program.coordinates:
            value, spec = self._values[name], self._program.by_name[name].spec
            if value.kind is Kind.OWN and value.rows == self._classes.root and spec is not None:
                source = self._found.source(name)
                if source is not None and not source.selected and spec.shape[1:] == (3,):
                    return source.position
        return None

    def _dependent(self, roots: set[str]) -> set[str]:
        found = set(roots)
        for name in self._forward:
            if any(i in found for i in self._program.by_name[name].inputs()):
                found.add(name)
        return found

    def _is_differentiable(self, name: str) -> bool:
        return name in self._on_parameter or name in self._on_coordinate


def _adds(node: Node) -> bool:
    if node.target == "aten.index_put.default":
        return len(node.args) > 3 and bool(node.args[3])
    if node.target == "aten.scatter_reduce.two":
        return node.args[4] == "sum"
    return node.target in _ADDING


def _is_largest(node: Node) -> bool:
    """Whether an index operation keeps the largest of floating-point values."""
    is_float = node.spec is not None and node.spec.dtype.is_floating_point
    return node.target == "aten.scatter_reduce.two" and node.args[4] == "amax" and is_float


def _exchange(rows: str) -> str:
    return f"exchange_{rows}"


def _extended(name: str) -> str:
    return f"{name}__with_halo"


def _refused(node: Node, what: str) -> CaptureError:
    return CaptureError(
        f"graph_size > 1 is not possible: operation {node.target} ({node.name}) of the potential {what}, for which "
        "there is no exchange between graph ranks. Use graph_size=1."
    )
