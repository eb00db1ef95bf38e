"""Inserts exchanges between graph ranks into a captured program, where they are needed.

Every rank of a stage runs the same operations on its own rows. How the ranks hold a value, its placement (see
:mod:`~lightning_januspipe.graph.placement`), follows from the placements of the operation's operands. An operation
without an exchange that has no derivative is run for the whole micro-batch on every rank, which takes its own rows.

An exchange stands where a value has to change its placement, or where rows of other ranks are read or written. Each is
a linear map whose backward pass is its transpose, so that it is right in all four phases.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.capture.trace.graph_walks import ancestors, descendants, differentiable, operations, readers
from lightning_januspipe.capture.trace.operators import (
    CREATES,
    GATHERS,
    RANGES,
    REPEATS,
    SCATTERS,
    SUMS_ROWS,
    is_size,
    is_zero,
    keeps_largest,
    mixes_along,
    operator_of,
    sums_into_rows,
)
from lightning_januspipe.capture.trace.program import Node, Ref
from lightning_januspipe.capture.trace.row_types import type_input
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.graph import exchange_ops
from lightning_januspipe.graph.index_analysis import IndexAnalysis, IndexUse
from lightning_januspipe.graph.placement import (
    PARTIAL_GRADIENT,
    REPLICATE,
    NoExchangeError,
    Placement,
    PlacementKind,
    no_exchange,
)
from lightning_januspipe.graph.rewrite import Rewrite, SizeOf, exchange_name, extended_name
from lightning_januspipe.graph.row_classes import find_row_classes, values_of_indices
from lightning_januspipe.graph.sharded_potential import IndexFunction, ShardedPotential
from lightning_januspipe.graph.sharded_stage import ExchangeSpec, PotentialWithExchanges
from lightning_januspipe.graph.verify_captured import compare_in_lock_step


@dataclass(frozen=True, kw_only=True)
class ShardedProgram(ShardedPotential):
    """Holds a captured potential for several graph ranks.

    Attributes:
        potential: with exchanges.
        captured: the same potential without exchanges.
    """

    potential: CapturedPotential
    captured: CapturedPotential

    def index_function(self, potential: nn.Module) -> IndexFunction:
        """Returns the function that computes the program's :attr:`computed` indices and :attr:`values`."""
        if not self.computed and not self.values:
            return super().index_function(potential)
        names = [*(n.source.node for n in self.computed), *self.values]
        forward = {*self.captured.regions.geometry, *self.captured.regions.body}
        function = ProgramFunction(self.captured.program, potential, forward, names)
        return lambda tensors: dict(zip(names, function(tensors), strict=True))

    def verify(
        self, potential: nn.Module, tensors: Sequence[Tensor], num_ranks: int, gradient_bytes: float | None = None
    ) -> bool:
        """Compares all ranks in lock-step with the whole micro-batch; see :meth:`ShardedPotential.verify`."""
        compare_in_lock_step(self.captured, self.potential, self, potential, tensors, num_ranks, gradient_bytes)
        return True


def shard_captured(captured: CapturedPotential) -> ShardedProgram:
    """Returns a copy of a captured potential with exchanges between graph ranks inserted.

    Args:
        captured: The potential, which stays as it is.

    Raises:
        CaptureError: An operation with a derivative combines rows in a way for which there is no exchange.
    """
    unplaced: set[str] = set()
    while True:
        inserter = _ExchangeInserter(captured, unplaced)
        try:
            return inserter.run()
        except NoExchangeError as error:
            if error.operation in unplaced or not inserter.may_run_whole(error.operation):
                raise
            unplaced.add(error.operation)


class _ExchangeInserter:
    """Inserts exchanges into a potential.

    Args:
        captured: the potential, which stays as it is.
        unplaced: operations to run for the whole micro-batch, because there is no exchange for them.
    """

    def __init__(self, captured: CapturedPotential, unplaced: Collection[str]) -> None:
        self._captured, self._program = captured, captured.program
        program, regions = captured.program, captured.regions
        forward = operations(program, {*regions.geometry, *regions.body})
        results = [*program.energies, *program.coordinates, *regions.observables]
        self._on_parameter = descendants(program, program.parameters)
        self._differentiable = self._on_parameter | differentiable(program, program.coordinates)
        self._forward, before = forward, len(forward) + 1
        # Indices that operations compute become inputs; what only they need is not run, and its indices do not count.
        while len(self._forward) < before:
            before = len(self._forward)
            self._found = IndexAnalysis(program, forward, captured.cut.sizes, self._forward)
            self._classes = find_row_classes(program, self._found)
            self._found.sharded = set(self._classes.names)
            self._indices = [n for n in self._found.row_indices if n.target in self._found.sharded]
            self._computed = [n.source.node for n in self._indices if n.source.node]
            needed = ancestors(program, results, given=set(self._computed))
            self._forward = [name for name in self._forward if name in needed]
        # Values of indices become inputs too.
        changing = self._differentiable
        values = values_of_indices(program, self._found, self._classes, self._forward, changing, unplaced)
        self._gone = [*self._computed, *values]
        needed = ancestors(program, results, given=set(self._gone))
        self._forward = [name for name in self._forward if name in needed]
        self._readers = readers(program)
        self._values = [n for n in values if n in results or needed.intersection(self._readers[n])]
        self._uses = {(u.node.name, u.dim): u for u in self._found.uses}
        self._known = {(n.source, n.slots) for n in self._found.row_indices}
        self._owners = {n.source for n in self._classes.owner.values()}
        self._placements: dict[str, Placement] = {}
        self._sizes: set[str] = set()
        self._extended: dict[str, int] = {}
        self._rewrite = Rewrite(program, self._gone)

    def run(self) -> ShardedProgram:
        """Visits all operations in order; returns the program with what was inserted."""
        program, placements = self._program, self._placements
        forward = set(self._forward)
        for node in program.nodes:
            if node.is_placeholder or node.name in self._gone:
                is_input = node.name in program.inputs or node.name in self._values or node.name in self._computed
                placements[node.name] = self._by_shape(node) if is_input else PARTIAL_GRADIENT
                if node.name in self._values and placements[node.name].times > 1:
                    raise no_exchange(node, "computes several values for each atom or edge, in one dimension")
            elif node.name in forward:
                placements[node.name] = self._visit(self._rewrite.nodes[node.name])
            if node.name in program.coordinates and placements[node.name] == PARTIAL_GRADIENT:
                placements[node.name] = REPLICATE
        for name in self._captured.regions.observables:
            if placements[name] == PARTIAL_GRADIENT:
                if name not in self._gone:
                    self._rewrite.follow(name, exchange_ops.count_once, self._classes.root)
                placements[name] = REPLICATE
        return self._result()

    def may_run_whole(self, name: str) -> bool:
        """Tells whether an operation can be run for the whole micro-batch, so that each rank takes its own rows.

        Rows that are given have no derivative. Look-ups by counts (0, 1, ...) need those of the rank's own rows.
        """
        counts = (u.index for u in self._found.uses if u.counts is not None)
        return name not in self._differentiable and name not in ancestors(self._program, counts)

    # -- placements --------------------------------------------------------------------------------------------------

    def _rows_of(self, spec: TensorSpec | None, node: Node) -> Placement | None:
        """Returns the placement of a shape with a sharded dimension; None for a shape without one."""
        found = []
        for dim, size in enumerate(spec.shape if spec is not None else ()):
            try:
                factor = self._found.factor(size)
            except ValueError as error:
                raise no_exchange(node, f"makes {error}") from error
            if factor is not None:
                found.append(Placement(PlacementKind.SHARD, factor[0], dim, factor[1]))
        if len(found) > 1:
            raise no_exchange(node, "has two dimensions of atoms or edges")
        return found[0] if found else None

    def _by_shape(self, node: Node) -> Placement:
        return self._rows_of(node.spec, node) or PARTIAL_GRADIENT

    def _visit(self, node: Node) -> Placement:
        if is_size(node):
            if self._sizes.intersection(node.inputs()) or self._is_sharded_size(node):
                self._sizes.add(node.name)
            return PARTIAL_GRADIENT
        counted = self._found.counts(node.name)
        if counted is not None and self._found.class_of(counted) in self._found.sharded:
            self._refuse_counting(node)
            return self._by_shape(node)
        self._refuse_sizes_as_values(node)
        if operator_of(node) in SCATTERS:
            written = self._written(node)
            if written is not None:
                return written
        elif operator_of(node) in GATHERS:
            self._read(node)
        return self._local(node)

    def _local(self, node: Node) -> Placement:
        """Places the result of an operation on each rank's own rows."""
        operator = operator_of(node)
        if operator in CREATES and node.spec is not None:
            return self._by_shape(node)
        given = self._operands(node)
        own = [self._placements[n] for n in given if self._placements[n].is_sharded]
        if len({p.rows for p in own}) > 1 and operator not in GATHERS:
            raise no_exchange(node, "combines rows of two kinds (atoms with edges, say)")
        created = self._rows_of(node.spec, node)
        if not own:
            if created is not None:
                if operator not in REPEATS and operator not in GATHERS:
                    raise no_exchange(node, "makes rows of atoms or edges from values that have none")
                self._replicate(node, given)
                return created
            return self._without_rows(node, given)
        self._replicate(node, given)
        if node.spec is None:  # several tensors
            return own[0]
        if created is None:
            if operator not in SUMS_ROWS:
                raise no_exchange(node, "combines all atoms or edges")
            return self._summed(node)
        if created.rows != own[-1].rows and operator not in GATHERS:
            raise no_exchange(node, "turns rows of one kind into rows of another")
        if mixes_along(node, own[0].dim):
            raise no_exchange(node, "combines all atoms or edges")
        return created

    def _without_rows(self, node: Node, given: Sequence[str]) -> Placement:
        """Places the result of an operation that all ranks run alike; it counts for parameter gradients once."""
        if all(self._placements[n] != REPLICATE for n in given):
            return PARTIAL_GRADIENT
        for name in given:
            if self._placements[name] == PARTIAL_GRADIENT and name in self._on_parameter:
                self._rewrite.give(node, name, exchange_ops.count_once, self._classes.root)
        return REPLICATE

    def _operands(self, node: Node) -> list[str]:
        """Returns the values that an operation reads, as the program had them, without sizes."""
        by_name = self._program.by_name
        return [n for n in by_name[node.name].inputs() if n not in self._sizes and not is_size(by_name[n])]

    def _summed(self, node: Node) -> Placement:
        self._rewrite.follow(node.name, exchange_ops.sum_over_ranks, self._classes.root)
        return REPLICATE if node.name in self._differentiable else PARTIAL_GRADIENT

    def _replicate(self, node: Node, given: Sequence[str]) -> None:
        """Marks where a replicated value is first used with each rank's own rows: its cotangents are summed."""
        for name in given:
            if self._placements[name] == REPLICATE and name in self._differentiable:
                self._rewrite.give(node, name, exchange_ops.replicate, self._classes.root)

    # -- index operations --------------------------------------------------------------------------------------------

    def _read(self, node: Node) -> None:
        """Gathers rows of other ranks before they are looked up."""
        name = str(node.args[0].name)
        placement = self._placements[name]
        use = self._use(node, placement)
        if use is None or use.counts is not None or use.source in self._owners:
            return
        if name in self._program.inputs and name not in self._differentiable:
            self._extended[name] = placement.dim
            node.args = (Ref(extended_name(name)), *node.args[1:])
            return
        if use.slots != 1:
            self._rewrite.give_flattened(node, name, placement.rows, self._sizes_of(placement.rows, use.slots))
            return
        extended = exchange_ops.with_room if is_zero(self._program, name) else exchange_ops.gather_halo
        self._rewrite.give(node, name, extended, placement.rows, placement.dim)

    def _use(self, node: Node, placement: Placement) -> IndexUse | None:
        """Returns the use of indices along the sharded rows that are read or written; they have to be known ones."""
        use = self._uses.get((node.name, placement.dim)) if placement.is_sharded else None
        if use is None:
            return None
        is_known = (use.source, use.slots) in self._known or self._found.class_of(use.counts or "") == placement.rows
        is_flat = use.slots != 1 and use.source is not None and bool(use.source.node)
        if not is_known or (placement.times > 1 and not is_flat) or (use.slots != 1 and not is_flat):
            raise no_exchange(node, "looks atoms or edges up by indices that it computes")
        return use

    def _sizes_of(self, rows: str, slots: int | str) -> tuple[SizeOf, SizeOf]:
        """Returns where a stage reads the number of own rows, and of slots of each: a number, or an input's size."""
        symbols = self._program.symbols
        own = next(place for s, place in symbols.items() if self._found.class_of(s) == rows)
        return own, symbols[slots] if isinstance(slots, str) else slots

    def _written(self, node: Node) -> Placement | None:
        """Sums written rows over the ranks that write them; returns None for rows that stay on the rank."""
        name = str(node.args[0].name)
        placement = self._placements[name]
        given = self._operands(node)
        if not placement.is_sharded:
            if not any(self._placements[n].is_sharded for n in given if n != name):
                return None
            if not sums_into_rows(node):
                raise no_exchange(node, "combines all atoms or edges, but does not sum")
            if is_zero(self._program, name):
                self._replicate(node, given)
                return self._summed(node)
            if operator_of(node) == "aten.scatter_reduce" and not node.kwargs.get("include_self", True):
                raise no_exchange(node, "replaces values that do not start at zero by sums of atoms or edges")
            self._replicate(node, [n for n in given if n != name])
            added = self._rewrite.add_after(node.name, exchange_ops.sum_over_ranks, self._classes.root)
            if placement == PARTIAL_GRADIENT and name in self._on_parameter:
                self._rewrite.give(added, name, exchange_ops.count_once, self._classes.root)
            return REPLICATE if node.name in self._differentiable else PARTIAL_GRADIENT
        use = self._use(node, placement)
        if use is None:
            return None
        self._replicate(node, given)
        if use.counts is not None or use.source in self._owners:
            return placement
        if use.slots != 1:
            raise no_exchange(node, "writes to flattened rows")
        if sums_into_rows(node):
            room, joined = exchange_ops.with_room, exchange_ops.sum_halo
        elif keeps_largest(node):
            room, joined = exchange_ops.with_low_room, exchange_ops.max_halo
        else:
            raise no_exchange(node, "writes rows that belong to other ranks")
        self._rewrite.give(node, name, room, placement.rows, placement.dim)
        self._rewrite.follow(node.name, joined, placement.rows, placement.dim)
        return placement

    # -- refusals ----------------------------------------------------------------------------------------------------

    def _is_sharded_size(self, node: Node) -> bool:
        if operator_of(node) != "aten.sym_size":
            return False
        placement, spec = self._placements.get(node.args[0].name), self._program.by_name[node.args[0].name].spec
        if placement is None or not placement.is_sharded or spec is None:
            return False
        return bool(node.args[1] % len(spec.shape) == placement.dim)

    def _refuse_sizes_as_values(self, node: Node) -> None:
        """Refuses a number of rows as a value: a rank's own number is right in shapes, and wrong in a mean."""
        plain = [a.name for a in (*node.args, *node.kwargs.values()) if isinstance(a, Ref) and a.name in self._sizes]
        if plain and operator_of(node) not in RANGES:
            raise no_exchange(node, "uses the number of atoms or edges as a value")

    def _refuse_counting(self, node: Node) -> None:
        """Refuses arithmetic on counts of rows (0, 1, ...): each rank counts its own, right in look-ups only."""
        for name in self._readers[node.name]:
            is_index = any(u.node.name == name and u.index == node.name for u in self._found.uses)
            if name in self._forward and self._found.counts(name) is None and not is_index:
                raise no_exchange(node, "does arithmetic on indices of atoms or edges")

    # -- result ------------------------------------------------------------------------------------------------------

    def _result(self) -> ShardedProgram:
        program, regions = self._program, self._captured.regions
        placed = [self._placements[name] for name in program.inputs]
        rows = {(position, p.dim): p.rows for position, p in enumerate(placed) if p.is_sharded}
        added = self._added()
        potential = PotentialWithExchanges(
            **vars(self._rewrite.potential(self._captured, list(added))),
            added=added,
            rows_of_symbols={s: rows[place] for s, place in program.symbols.items() if place in rows},
        )
        return ShardedProgram(
            potential=potential,
            captured=self._captured,
            bind=potential.program.bind,
            classes=self._classes,
            rows=rows,
            localized={n.source: n.target for n in self._indices if not n.source.node},
            computed=tuple(n for n in self._indices if n.source.node),
            values={name: self._placements[name] for name in self._values},
            observables=tuple(self._placements[n] for n in regions.observables),
            derivatives=tuple(self._placements[n] for n in program.coordinates),
            positions=self._positions(),
            types=type_input(program),
            extended=tuple((program.inputs.index(name), dim) for name, dim in self._extended.items()),
        )

    def _added(self) -> dict[str, TensorSpec | ExchangeSpec]:
        """Returns the inputs that follow the potential's own: exchanges, extended inputs, precomputed values."""
        exchanges = {rows: ExchangeSpec(rows) for rows in self._classes.names}
        added: dict[str, TensorSpec | ExchangeSpec] = {exchange_name(rows): spec for rows, spec in exchanges.items()}
        for name, dim in self._extended.items():
            spec, rows = self._program.spec(name), self._placements[name].rows
            shape = [f"{s} + {exchanges[rows].halo}" if d == dim else s for d, s in enumerate(spec.shape)]
            added[extended_name(name)] = replace(spec, shape=tuple(shape))
        return added | {name: self._program.spec(name) for name in (*self._computed, *self._values)}

    def _positions(self) -> int | None:
        """Returns the input that the first differentiation input of atoms is made from, if it has its shape."""
        for name in self._program.coordinates:
            placement = self._placements[name]
            if placement.is_sharded and placement.rows == self._classes.root:
                source = self._found.source(name)
                if source is not None and not source.selected and self._program.spec(name).shape[1:] == (3,):
                    return source.position
        return None
