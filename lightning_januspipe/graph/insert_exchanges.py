"""Exchanges between graph ranks, put into a captured program where they are needed.

Every rank of a stage runs the same operations on its own rows. What a value is to the ranks (see
:mod:`~lightning_januspipe.graph.placement`) follows from its operands.

An exchange stands where a value has to become another kind, or rows of other ranks are read or written. Each is a
linear map whose backward pass is its transpose, so that it is right in all four phases.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.program import Node, Ref, refs
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.graph import exchange_ops
from lightning_januspipe.graph.index_analysis import GATHERING, SCATTERING, IndexAnalysis, IndexUse
from lightning_januspipe.graph.placement import (
    CONSTANT,
    CONTRACTING,
    PARTIAL_GRADIENT,
    REPEATING,
    REPLICATE,
    Placement,
    PlacementKind,
    adds,
    is_largest,
    is_size,
    is_zero,
    mixes,
    refused,
)
from lightning_januspipe.graph.rewrite import Rewrite, exchange_name, extended_name
from lightning_januspipe.graph.row_classes import find_row_classes, refuse_index_arithmetic
from lightning_januspipe.graph.sharded_potential import ShardedPotential


def shard_captured(captured: CapturedPotential) -> ShardedPotential[CapturedPotential]:
    """Put exchanges into a captured potential.

    Raises:
        CaptureError: an operation mixes rows in a way that has no exchange here.
    """
    return _ExchangeInserter(captured).run()


class _ExchangeInserter:
    def __init__(self, captured: CapturedPotential) -> None:
        self._captured, self._program = captured, captured.program
        forward = {*captured.regions.geometry, *captured.regions.body}
        self._forward = [n.name for n in self._program.nodes if n.name in forward]
        self._found = IndexAnalysis(self._program, self._forward, captured.cut.sizes)
        self._classes = find_row_classes(self._program, self._found)
        self._sharded = self._found.sharded = set(self._classes.names)
        self._computed = [n.source.node for n in self._found.row_indices if n.source.node and n.of in self._sharded]
        self._forward = self._alive()
        refuse_index_arithmetic(self._program, self._found, self._classes, self._forward)
        self._uses = {(u.node.name, u.dim): u for u in self._found.uses}
        self._known = {n.source for n in self._found.row_indices}
        self._owners = {n.source for n in self._classes.owner.values()}
        self._on_parameter = self._program.dependent(self._program.parameters)
        self._on_coordinate = self._program.dependent(self._program.coordinates)
        self._values: dict[str, Placement] = {}
        self._sizes: set[str] = set()
        self._extended: dict[str, int] = {}
        self._rewrite = Rewrite(self._program, self._computed)

    def run(self) -> ShardedPotential[CapturedPotential]:
        """All operations in order; then the program with what was inserted."""
        program = self._program
        forward = set(self._forward)
        for node in program.nodes:
            if node.op == "placeholder" or node.name in self._computed:
                self._values[node.name] = self._of_input(node)
            elif node.name in forward:
                self._values[node.name] = self._visit(self._rewrite.nodes[node.name])
            if node.name in program.coordinates and self._values[node.name].kind is PlacementKind.PARTIAL_GRADIENT:
                self._values[node.name] = REPLICATE
        for name in self._captured.regions.observables:
            if self._values[name].kind is PlacementKind.PARTIAL_GRADIENT:
                self._rewrite.follow(name, exchange_ops.count_once, self._classes.root)
                self._values[name] = REPLICATE
        return self._result()

    # -- kinds -------------------------------------------------------------------------------------------------------

    def _of_input(self, node: Node) -> Placement:
        is_input = node.name in self._program.inputs or node.name in self._computed
        if not is_input or node.spec is None:
            return PARTIAL_GRADIENT
        return self._rows_of(node.spec, node) or PARTIAL_GRADIENT

    def _rows_of(self, spec: TensorSpec, node: Node) -> Placement | None:
        """The one sharded dimension of a shape, if there is one."""
        found = []
        for dim, size in enumerate(spec.shape):
            try:
                factor = self._found.factor(size)
            except ValueError as error:
                raise refused(node, f"makes {error}") from error
            if factor is not None:
                found.append(Placement(PlacementKind.SHARD, factor[0], dim, factor[1]))
        if len(found) > 1:
            raise refused(node, "has two dimensions of atoms or edges")
        return found[0] if found else None

    def _visit(self, node: Node) -> Placement:
        if is_size(node):
            if any(r.name in self._sizes for r in refs(node.args)) or self._is_sharded_size(node):
                self._sizes.add(node.name)
            return PARTIAL_GRADIENT
        counted = self._found.counts(node.name)
        if counted is not None and self._found.class_of(counted) in self._sharded:
            self._refuse_counting(node)
            return self._rows_of(node.spec, node) or PARTIAL_GRADIENT if node.spec is not None else PARTIAL_GRADIENT
        self._refuse_sizes_as_numbers(node)
        if node.target in SCATTERING:
            written = self._written(node)
            if written is not None:
                return written
        elif node.target in GATHERING:
            self._read(node)
        return self._local(node)

    def _local(self, node: Node) -> Placement:
        """An operation on each rank's rows."""
        if CONSTANT.match(str(node.target)) and node.spec is not None:
            return self._rows_of(node.spec, node) or PARTIAL_GRADIENT
        given = self._operands(node)
        own = [self._values[n] for n in given if self._values[n].is_sharded]
        if len({v.rows for v in own}) > 1 and node.target not in GATHERING:
            raise refused(node, "combines rows of two kinds, atoms with edges, say")
        created = self._rows_of(node.spec, node) if node.spec is not None else None
        if not own:
            if created is not None:
                if REPEATING.match(str(node.target)) is None and node.target not in GATHERING:
                    raise refused(node, "makes one row for each atom or edge of something else")
                self._replicate(node, given)
                return created
            is_replicated = any(self._values[n].kind is PlacementKind.REPLICATE for n in given)
            if is_replicated:
                for name in given:
                    if self._values[name].kind is PlacementKind.PARTIAL_GRADIENT and name in self._on_parameter:
                        self._rewrite.give(node, name, exchange_ops.count_once, self._classes.root)
            return REPLICATE if is_replicated else PARTIAL_GRADIENT
        self._replicate(node, given)
        if node.spec is None:  # several tensors
            return own[0]
        if created is None:
            if node.target not in CONTRACTING:
                raise refused(node, "combines all atoms or edges")
            return self._summed(node)
        if created.rows != own[-1].rows and node.target not in GATHERING:
            raise refused(node, "turns rows of one kind into rows of another")
        if mixes(node, own[0]):
            raise refused(node, "combines all atoms or edges")
        return created

    def _operands(self, node: Node) -> list[str]:
        """Values that an operation reads, as the program had them, without sizes."""
        by_name = self._program.by_name
        return [n for n in by_name[node.name].inputs() if n not in self._sizes and not is_size(by_name[n])]

    def _summed(self, node: Node) -> Placement:
        self._rewrite.follow(node.name, exchange_ops.sum_over_ranks, self._classes.root)
        return REPLICATE if self._is_differentiable(node.name) else PARTIAL_GRADIENT

    def _replicate(self, node: Node, given: Sequence[str]) -> None:
        """What is the same on all ranks enters what each does with its own rows: cotangents have to be summed."""
        for name in given:
            if self._values[name].kind is PlacementKind.REPLICATE and self._is_differentiable(name):
                self._rewrite.give(node, name, exchange_ops.replicate, self._classes.root)

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
            node.args = (Ref(extended_name(name)), *node.args[1:])
            return
        extended = exchange_ops.with_room if is_zero(self._program, name) else exchange_ops.gather_halo
        self._rewrite.give(node, name, extended, value.rows, value.dim)

    def _use(self, node: Node, value: Placement) -> IndexUse | None:
        """The index along the rows of what is read or written, which has to come from an input."""
        if not value.is_sharded:
            return None
        use = self._uses.get((node.name, value.dim))
        if use is None:
            return None
        is_known = use.source in self._known or self._found.class_of(use.counts or "") == value.rows
        if not is_known or value.times > 1:
            raise refused(node, "looks atoms or edges up by numbers that it computes")
        return use

    def _written(self, node: Node) -> Placement | None:
        """Rows that are summed up: what belongs to rows of other ranks goes there. None for what stays on the rank."""
        name = str(node.args[0].name)
        value = self._values[name]
        dim = None if not value.is_sharded else value.dim
        given = [n for n in self._operands(node) if n != name and self._values[n].is_sharded]
        if dim is not None:
            use = self._use(node, value)
            if use is None:
                return None
            if use.counts is not None or use.source in self._owners:
                self._replicate(node, self._operands(node))
                return value
            if not adds(node) and not is_largest(node):
                raise refused(node, "writes rows that belong to other ranks")
            self._replicate(node, self._operands(node))
            room, joined = (exchange_ops.with_room, exchange_ops.sum_halo)
            if is_largest(node):
                room, joined = (exchange_ops.with_low_room, exchange_ops.max_halo)
            self._rewrite.give(node, name, room, value.rows, value.dim)
            self._rewrite.follow(node.name, joined, value.rows, value.dim)
            return value
        if not given:
            return None
        if not adds(node):
            raise refused(node, "combines all atoms or edges, but does not sum")
        if not is_zero(self._program, name):
            raise refused(node, "sums atoms or edges into values that are not zero at first")
        self._replicate(node, self._operands(node))
        return self._summed(node)

    # -- refusals ----------------------------------------------------------------------------------------------------

    def _is_sharded_size(self, node: Node) -> bool:
        if node.target != "aten.sym_size.int":
            return False
        value = self._values.get(node.args[0].name)
        spec = self._program.by_name[node.args[0].name].spec
        if value is None or not value.is_sharded or spec is None:
            return False
        return node.args[1] % len(spec.shape) == value.dim

    def _refuse_sizes_as_numbers(self, node: Node) -> None:
        """A rank knows the number of its own rows only, which is right in shapes and wrong in a mean."""
        plain = [a.name for a in (*node.args, *node.kwargs.values()) if isinstance(a, Ref) and a.name in self._sizes]
        if plain and not str(node.target).startswith(("aten.slice.", "aten.narrow.")):
            raise refused(node, "computes with the number of atoms or edges")

    def _refuse_counting(self, node: Node) -> None:
        """Rows are counted on each rank for itself, which is right for looking them up, and for nothing else."""
        for name in self._forward:
            user = self._program.by_name[name]
            if node.name not in user.inputs() or self._found.counts(name) is not None:
                continue
            uses = [u for u in self._found.uses if u.node.name == name and u.index == node.name]
            if not uses:
                raise refused(node, "computes with the numbers of atoms or edges")

    def _result(self) -> ShardedPotential[CapturedPotential]:
        program, regions = self._program, self._captured.regions
        exchanges, extended = map(exchange_name, self._classes.names), map(extended_name, self._extended)
        rows = {
            (position, value.dim): value.rows
            for position, name in enumerate(program.inputs)
            for value in [self._values[name]]
            if value.is_sharded
        }
        potential = self._rewrite.potential(self._captured, [*exchanges, *extended, *self._computed])
        return ShardedPotential[CapturedPotential](
            potential=potential,
            bind=potential.program.bind,
            classes=self._classes,
            rows=rows,
            renumbered={n.source: n.of for n in self._found.row_indices if n.of in self._sharded and not n.source.node},
            computed=tuple(n for n in self._found.row_indices if n.of in self._sharded and n.source.node),
            observables=tuple(self._values[n] for n in regions.observables),
            derivatives=tuple(self._values[n] for n in program.coordinates),
            positions=self._positions(),
            extended=tuple((program.inputs.index(name), dim) for name, dim in self._extended.items()),
        )

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
            if value.is_sharded and value.rows == self._classes.root and spec is not None:
                source = self._found.source(name)
                if source is not None and not source.selected and spec.shape[1:] == (3,):
                    return source.position
        return None

    def _is_differentiable(self, name: str) -> bool:
        return name in self._on_parameter or name in self._on_coordinate
