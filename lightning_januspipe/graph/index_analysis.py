"""Where a captured program holds numbers of rows: which atoms an edge joins, which edges an angle.

A *class* of rows is what tensors have an entry for: atoms, edges, angles. It is named by the size symbol of the program
that counts its rows. Index operations tell which inputs hold numbers of rows of which class, without any names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_januspipe.capture.trace.program import Node, Program, Ref, target_function
from lightning_januspipe.engine.specs import TensorSpec

_PASSING = {
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unsqueeze.default"),
    *("aten.squeeze.dims", "aten.expand.default", "aten.expand_as.default", "aten.clone.default"),
    *("aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.contiguous.default"),
    *("aten.detach.default",),
    *("aten.alias.default", "aten.flatten.using_ints", "aten.t.default", "aten.transpose.int", "aten.permute.default"),
    *("aten.lift_fresh_copy.default", "aten.type_as.default", "aten.to.device", "aten.to.other"),
}
"""Operations that keep numbers what they are."""

GATHERING = {
    "aten.index.Tensor": (0, 1, None),
    "aten._unsafe_index.Tensor": (0, 1, None),
    "aten.index_select.default": (0, 2, 1),
    "aten.gather.default": (0, 2, 1),
}
"""Reading rows: the places of what is read, of the numbers, and of the dimension (None where numbers are a list)."""

SCATTERING = {
    "aten.index_put.default": (0, 1, None),
    "aten.index_add.default": (0, 2, 1),
    "aten.scatter_add.default": (0, 2, 1),
    "aten.scatter_reduce.two": (0, 2, 1),
    "aten.scatter.src": (0, 2, 1),
    "aten.scatter.value": (0, 2, 1),
    "aten.index_reduce.default": (0, 2, 1),
}
"""Writing rows; places as in :data:`GATHERING`."""


_BATCHED = {"aten.bmm.default", "aten.baddbmm.default", "aten.matmul.default"}


@dataclass(frozen=True)
class IndexSource:
    """An input, or a part of it, or integers that are computed from inputs.

    Attributes:
        position: of the program's input; -1 if it is none.
        selected: (dimension, place) of each selection, in order.
        node: the operation that computes it, if it is no input.
    """

    position: int
    selected: tuple[tuple[int, int], ...] = ()
    node: str = ""


@dataclass(frozen=True)
class RowIndex:
    """Numbers of rows in an input.

    Attributes:
        source: where they stand.
        rows: the class of which each row has one, or several.
        of: the class that they count.
        writes: whether rows are summed by them, anywhere.
        dim: of the rows.
        is_table: whether each row has several, as in a table of the neighbors of each atom.
    """

    source: IndexSource
    rows: str
    of: str
    writes: bool
    dim: int = 0
    is_table: bool = False


@dataclass(frozen=True)
class IndexUse:
    """One index operation along a dimension with rows.

    Attributes:
        node: the operation.
        dim: of what it reads or writes.
        symbol: size of that dimension.
        index: name of the node with the numbers.
        source: where these come from; None if they are computed.
        counts: where they are 0, 1, 2, ...: the size symbol that they end before.
    """

    node: Node
    dim: int
    symbol: str
    index: str
    source: IndexSource | None
    counts: str | None


def symbolic(size: int | str) -> str | None:
    """A size that is a symbol by itself."""
    return size if isinstance(size, str) and size.isidentifier() else None


def indices(node: Node) -> list[tuple[int, str]]:
    """Dimensions and index nodes of an index operation."""
    table = GATHERING if node.target in GATHERING else SCATTERING
    _, index, dim = table[node.target]
    if dim is None:
        return [(d, i.name) for d, i in enumerate(node.args[index]) if isinstance(i, Ref)]
    return [(node.args[dim], node.args[index].name)]


def base(node: Node) -> str:
    """What an index operation reads or writes."""
    return str(node.args[0].name)


class IndexAnalysis:
    """The index operations of a program, and the classes of rows that follow from them.

    Args:
        program: the captured potential's.
        nodes: names of the operations of its forward pass.
        sizes: values of the size expressions in shapes, on an example batch.

    Attributes:
        uses: index operations along dimensions with symbolic sizes.
        numbers: inputs with numbers of rows.
        sharded: the classes that are sharded over the ranks, once they are known.
    """

    def __init__(self, program: Program, nodes: Sequence[str], sizes: Mapping[str, int]) -> None:
        self._program, self._example = program, sizes
        self._positions = {name: i for i, name in enumerate(program.inputs)}
        self._sources: dict[str, IndexSource | None] = {}
        self._of_inputs = self._depends_on_inputs_only(nodes)
        self._same: dict[str, str] = {}
        self.sharded: set[str] = set()
        self.uses = [use for name in nodes for use in self._uses(program.by_name[name])]
        for name in nodes:
            self._join_broadcast(program.by_name[name])
        of_source: dict[IndexSource, str] = {}
        for use in self.uses:
            if use.source is not None:
                of_source[use.source] = self._joined(of_source.setdefault(use.source, use.symbol), use.symbol)
        written = {u.source for u in self.uses if u.node.target in SCATTERING}
        self.row_indices = [
            RowIndex(
                source,
                self.class_of(rows),
                self.class_of(of),
                source in written,
                dim,
                any(s != 1 for s in sizes[:dim] + sizes[dim + 1 :]),
            )
            for source, of in of_source.items()
            for sizes in [self._sizes(source)]
            for dim, rows in self._rows(sizes)
        ]

    def class_of(self, symbol: str) -> str:
        """The class that a size symbol counts: symbols that one input's numbers count are one class."""
        while symbol in self._same:
            symbol = self._same[symbol]
        return symbol

    def factor(self, size: int | str) -> tuple[str, int] | None:
        """The one class that a size counts, and how many entries each of its rows takes; None if there is no class.

        Raises:
            ValueError: the size is no multiple of a number of rows.
        """
        symbols = re.findall(r"[A-Za-z_]\w*", size) if isinstance(size, str) else []
        rows = [s for s in symbols if s in self._example and self.class_of(s) in self.sharded]
        if not rows:
            return None
        num = 6  # any number; that of the example may be 0
        values = {s: n for s, n in self._example.items() if s.isidentifier()}
        counts = [{s: n for s in values if self.class_of(s) == self.class_of(rows[0])} for n in (num, 2 * num)]
        once, double = (TensorSpec((size,), torch.int64).sizes({**values, **c})[0] for c in counts)
        if double != 2 * once or once % num:
            raise ValueError(f"a size {size}")
        return self.class_of(rows[0]), once // num

    def _join_broadcast(self, node: Node) -> None:
        """Sizes that an operation takes for one are one, whichever symbols the trace has for them."""
        is_batched = node.target in _BATCHED
        if node.spec is None or not (is_batched or _is_pointwise(node)):
            return
        specs = [self._program.by_name[name].spec for name in node.inputs()]
        for spec in specs:
            for back in range(1, 1 + min(len(node.spec.shape), len(spec.shape) if spec is not None else 0)):
                if spec is not None and not (is_batched and back != len(node.spec.shape)):
                    self._join_sizes(node.spec.shape[-back], spec.shape[-back])

    def _join_sizes(self, a: int | str, b: int | str) -> None:
        if isinstance(a, str) and isinstance(b, str) and a != b and self._example.get(a, 0) == self._example.get(b, 1):
            pair = [self._counting(a), self._counting(b)]
            if pair[0] is not None and pair[1] is not None:
                self._joined(pair[0], pair[1])

    def _counting(self, size: str) -> str | None:
        """The symbol in an expression that has its value, if it is more than one."""
        value = self._example[size]
        symbols = [s for s in re.findall(r"[A-Za-z_]\w*", size) if self._example.get(s) == value and value > 1]
        return symbols[0] if len(symbols) == 1 else None

    def source(self, name: str) -> IndexSource | None:
        """The input, or part of one, that a node's values are; None if they are computed."""
        if name not in self._sources:
            node = self._program.by_name[name]
            found = self._find(node)
            if found is None and self._is_computed(node):
                found = IndexSource(-1, (), name)
            self._sources[name] = found
        return self._sources[name]

    def _is_computed(self, node: Node) -> bool:
        """Whether a node holds one integer for each row, computed from inputs only, such as the atom of an angle."""
        if node.name not in self._of_inputs or node.spec is None or node.spec.dtype not in (torch.int64, torch.int32):
            return False
        return sum(symbolic(size) is not None for size in node.spec.shape) == 1

    def _depends_on_inputs_only(self, nodes: Sequence[str]) -> set[str]:
        found = {n.name for n in self._program.nodes if n.op == "placeholder"} - set(self._program.parameters)
        for name in nodes:
            if found.issuperset(self._program.by_name[name].inputs()):
                found.add(name)
        return found

    def counts(self, name: str) -> str | None:
        """The size symbol up to which a node's values count from 0; None if they are others."""
        node = self._program.by_name[name]
        first = node.args[0] if node.args else None
        if not isinstance(first, Ref):
            return None
        if node.target in _PASSING:
            return self.counts(first.name)
        size = self._program.by_name[first.name]
        if node.target != "aten.arange.default" or size.target != "aten.sym_size.int":
            return None
        spec = self._program.by_name[size.args[0].name].spec
        return None if spec is None else symbolic(spec.shape[size.args[1]])

    def _find(self, node: Node) -> IndexSource | None:
        if node.op == "placeholder":
            return IndexSource(self._positions[node.name]) if node.name in self._positions else None
        first = node.args[0] if node.args else None
        if not isinstance(first, Ref):
            return None
        if node.target in _PASSING:
            return self.source(first.name)
        if node.target == "aten.select.int":
            return self._selected(first.name, *node.args[1:3])
        if getattr(node.target, "__name__", "") == "getitem":
            whole = self._program.by_name[first.name]
            if whole.target == "aten.unbind.int":
                return self._selected(whole.args[0].name, whole.args[1] if len(whole.args) > 1 else 0, node.args[1])
        return None

    def _selected(self, name: str, dim: int, place: int) -> IndexSource | None:
        found, spec = self.source(name), self._program.by_name[name].spec
        if found is None or found.node or spec is None or list(spec.shape) != self._sizes(found):
            return None
        return IndexSource(found.position, (*found.selected, (dim % len(spec.shape), place)))

    def _sizes(self, source: IndexSource) -> list[int | str]:
        """The shape of an input's part."""
        spec = self._program.by_name[source.node or self._program.inputs[source.position]].spec
        assert spec is not None
        sizes = list(spec.shape)
        for dim, _ in source.selected:
            del sizes[dim]
        return sizes

    def _uses(self, node: Node) -> Iterable[IndexUse]:
        if node.target not in GATHERING and node.target not in SCATTERING:
            return
        spec = self._program.by_name[base(node)].spec
        for dim, index in indices(node):
            if spec is not None and spec.shape:
                symbol = symbolic(spec.shape[dim])
                if symbol is not None:
                    yield IndexUse(node, dim % len(spec.shape), symbol, index, self.source(index), self.counts(index))

    def _joined(self, a: str, b: str) -> str:
        a, b = self.class_of(a), self.class_of(b)
        if a != b:
            self._same[b] = a
        return a

    def _rows(self, sizes: Sequence[int | str]) -> list[tuple[int, str]]:
        """Dimension and size symbol of the rows of numbers; nothing where it is not clear which they are."""
        found = [(dim, s) for dim, s in enumerate(map(symbolic, sizes)) if s is not None]
        if len(found) > 1:  # a table may have as many columns as there are
            counted = {self.class_of(u.symbol) for u in self.uses}
            found = [(dim, s) for dim, s in found if self.class_of(s) in counted]
        return found if len(found) == 1 else []


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, str) and torch.Tag.pointwise in getattr(target_function(node.target), "tags", ())
