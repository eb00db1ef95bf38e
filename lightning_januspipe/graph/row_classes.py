"""Which classes of rows are sharded over the graph ranks, by which numbers, and what forbids that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_januspipe.capture.trace.program import Node, Program, refs
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.index_analysis import IndexAnalysis, IndexSource, RowIndex, symbolic


@dataclass(frozen=True)
class RowClasses:
    """The classes whose rows are sharded over the ranks.

    Attributes:
        root: that of the atoms, whose owners are chosen.
        owner: of every other class the numbers that tell to whose owner a row belongs.
        readers: of every class the numbers that may point to rows of other ranks.
    """

    root: str
    owner: Mapping[str, RowIndex]
    readers: Mapping[str, Sequence[RowIndex]]

    @property
    def names(self) -> list[str]:
        """All of them, those that others hang on first."""
        return [self.root, *self.owner]


def find_row_classes(program: Program, found: IndexAnalysis) -> RowClasses:
    """Which classes are sharded, and by what.

    Atoms are what energies are differentiated by, or where these are vectors of edges, what these join. Other rows
    belong to the owner of the row that they are summed into, or that they are read with.

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
    pairs = [n.of for n in found.row_indices if n.rows == root]
    twice = [of for of in dict.fromkeys(pairs) if pairs.count(of) > 1]
    root = twice[0] if twice else root
    owner: dict[str, RowIndex] = {}
    sharded, grows = {root}, True
    while grows:
        candidates = [n for n in found.row_indices if n.of in sharded and n.rows not in sharded and not n.is_table]
        candidates.sort(key=lambda n: not n.writes)
        grows = bool(candidates)
        if grows:
            owner[candidates[0].rows] = candidates[0]
            sharded.add(candidates[0].rows)
    readers = {
        name: [n for n in found.row_indices if n.of == name and owner.get(n.rows) is not n] for name in (root, *owner)
    }
    return RowClasses(root, owner, readers)


def refuse_index_arithmetic(program: Program, found: IndexAnalysis, classes: RowClasses, nodes: Sequence[str]) -> None:
    """Refuse programs that compute with the numbers of sharded rows: each rank has numbers of its own.

    Raises:
        CaptureError: they are compared, added, or looked up themselves.
    """
    sharded = set(classes.names)
    renumbered = [n.source for n in found.row_indices if n.of in sharded]
    indexed = {(u.node.name, u.index) for u in found.uses}
    for name in nodes:
        node = program.by_name[name]
        own = found.source(name)
        if node.spec is None or (own is not None and own.node != name):  # the same numbers, or a part of them
            continue
        for given in dict.fromkeys(r.name for r in refs((node.args, node.kwargs))):
            source = found.source(given)
            if source is None or (name, given) in indexed:
                continue
            if any(_overlap(source, other) for other in renumbered) and not _only_shape(node, given):
                raise CaptureError(
                    f"graph_size > 1 is not possible: the potential computes {node.target} of the numbers of atoms or "
                    "edges in one of its inputs, but each graph rank numbers its own rows. Use graph_size=1."
                )


def _overlap(a: IndexSource, b: IndexSource) -> bool:
    if a.node or b.node:
        return a.node == b.node
    shorter = min(len(a.selected), len(b.selected))
    return a.position == b.position and a.selected[:shorter] == b.selected[:shorter]


def _only_shape(node: Node, given: str) -> bool:
    return str(node.target).startswith(("aten.new_", "aten.zeros_like", "aten.ones_like", "aten.full_like")) or (
        str(node.target) == "aten.unbind.int"
    )
