"""Decides which classes of rows are sharded over the graph ranks, and refuses programs that forbid it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_januspipe.capture.trace.operators import SHAPE_ONLY, operator_of
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
    joined = [n.target for n in found.row_indices if n.holder == root]
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


def refuse_index_arithmetic(program: Program, found: IndexAnalysis, classes: RowClasses, nodes: Sequence[str]) -> None:
    """Refuses programs that compute with indices of sharded rows: each rank has indices of its own.

    Raises:
        CaptureError: such indices are compared, added, or looked up themselves.
    """
    localized = [n.source for n in found.row_indices if n.target in classes.names]
    indexed = {(u.node.name, u.index) for u in found.uses}
    for name in nodes:
        node = program.by_name[name]
        own = found.source(name)
        if node.spec is None or (own is not None and own.node != name):  # the same indices, or a part of them
            continue
        if operator_of(node) in SHAPE_ONLY or operator_of(node) == "aten.unbind":
            continue
        for given in node.inputs():
            source = found.source(given)
            if source is None or (name, given) in indexed:
                continue
            if any(_overlap(source, other) for other in localized):
                raise CaptureError(
                    f"graph_size > 1 is not possible: the potential computes {node.target} of the indices of atoms or "
                    "edges in one of its inputs, but each graph rank indexes its own rows. Use graph_size=1."
                )


def _overlap(a: IndexSource, b: IndexSource) -> bool:
    if a.node or b.node:
        return a.node == b.node
    shorter = min(len(a.selected), len(b.selected))
    return a.position == b.position and a.selected[:shorter] == b.selected[:shorter]
