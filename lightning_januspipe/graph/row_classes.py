"""Decides which classes of rows are sharded over the graph ranks, and what is computed before rows are sharded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_januspipe.capture.trace.operators import SHAPE_ONLY, is_of_package, is_size, operator_of
from lightning_januspipe.capture.trace.program import Program
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.index_analysis import IndexAnalysis, IndexSource, RowIndex, symbolic


@dataclass(frozen=True)
class RowClasses:
    """Holds the classes whose rows are sharded over the ranks.

    Attributes:
        root: the class of the atoms, whose owners are chosen.
        owner: for every other class the indices that decide: a row belongs to the owner of the row it points to.
        readers: for every class the indices that may point to rows of other ranks.
    """

    root: str
    owner: Mapping[str, RowIndex]
    readers: Mapping[str, Sequence[RowIndex]]

    @property
    def names(self) -> list[str]:
        """Returns all classes; each comes after the class that its owners follow from."""
        return [self.root, *self.owner]

    @property
    def edges(self) -> str:
        """Returns the class of rows that go with an atom to its owner: edges, or the atoms where there are none."""
        return next((name for name, owning in self.owner.items() if owning.target == self.root), self.root)


def find_row_classes(program: Program, found: IndexAnalysis) -> RowClasses:
    """Finds the classes of rows that are sharded.

    Atoms are what the energy is differentiated by; where these are vectors of edges, atoms are what edges join. Other
    rows belong to the owner of the row that they are summed into, or else that they are read with.

    Raises:
        CaptureError: there are no atoms that anything is looked up from.
    """
    specs = [program.by_name[n].spec for n in program.coordinates]
    first = [symbolic(s.shape[0]) for s in specs if s is not None and len(s.shape) == 2]
    known = [found.class_of(s) for s in first if s is not None]
    if not known:
        raise CaptureError(
            "graph_size > 1 needs an energy that is differentiated by positions (N, 3) or edge vectors (E, 3); the "
            "differentiation inputs of this potential have other shapes. Use graph_size=1."
        )
    root = known[0]
    joined = [n.target for n in found.row_indices if n.holder == root and not n.is_table]
    root = next((target for target in dict.fromkeys(joined) if joined.count(target) > 1), root)
    owner: dict[str, RowIndex] = {}
    while True:
        sharded = {root, *owner}
        candidates = [
            n for n in found.row_indices if n.target in sharded and n.holder not in sharded and not n.is_table
        ]
        if not candidates:
            break
        chosen = next((n for n in candidates if n.writes), candidates[0])
        owner[chosen.holder] = chosen
    readers = {
        name: [n for n in found.row_indices if n.target == name and owner.get(n.holder) is not n]
        for name in (root, *owner)
    }
    return RowClasses(root, owner, readers)


def values_of_indices(
    program: Program,
    found: IndexAnalysis,
    classes: RowClasses,
    nodes: Sequence[str],
    changing: Collection[str],
    unplaced: Collection[str] = (),
) -> list[str]:
    """Returns the operations that are run for the whole micro-batch before its stages, and whose own rows ranks get.

    These compute with indices of sharded rows, such as a comparison of both atoms of an edge, because each rank has
    indices of its own, or they have no derivative and combine rows in a way for which there is no exchange. What is
    computed from their results and has no derivative either is run for the whole micro-batch too.

    Args:
        program: the captured program.
        found: its index operations.
        classes: the classes of rows that are sharded.
        nodes: its operations, in execution order.
        changing: values that depend on parameters or on what the energy is differentiated by.
        unplaced: operations without a derivative for which there is no exchange.

    Raises:
        CaptureError: an operation computes with indices and with such values, or is an operation of a package.
    """
    localized = [n.source for n in found.row_indices if n.target in classes.names]
    indexed = {(u.node.name, u.index) for u in found.uses}
    whole: dict[str, bool] = {}
    made = program.inputs[len(program.inputs) - len(program.prepared) :]  # for the whole micro-batch
    for name in nodes:
        node = program.by_name[name]
        own, of_package = found.source(name), is_of_package(node)
        given = set(node.inputs())
        reads_whole = not given.isdisjoint(whole)
        if own is not None and own.node != name and not reads_whole:  # the same indices, or a part of them
            continue
        if operator_of(node) in SHAPE_ONLY or is_size(node) or (operator_of(node) == "aten.unbind" and not reads_whole):
            continue
        sources = [found.source(g) for g in given if (name, g) not in indexed]
        of_indices = any(_overlap(source, other) for source in sources if source is not None for other in localized)
        reads_values = reads_whole or not given.isdisjoint(made)
        if (of_indices and name in changing) or ((of_indices or reads_values) and of_package):
            raise CaptureError(
                f"graph_size > 1 is not possible: the potential computes {node.target} of the indices of atoms or "
                "edges in one of its inputs, together with features or by an operation of a package, but each graph "
                "rank indexes its own rows. Use graph_size=1."
            )
        if name not in changing and (of_indices or reads_whole or name in unplaced):
            whole[name] = node.spec is not None
    return [name for name, is_tensor in whole.items() if is_tensor]


def _overlap(a: IndexSource, b: IndexSource) -> bool:
    if a.node or b.node:
        return a.node == b.node
    shorter = min(len(a.selected), len(b.selected))
    return a.position == b.position and a.selected[:shorter] == b.selected[:shorter]
