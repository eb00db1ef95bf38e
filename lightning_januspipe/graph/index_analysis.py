"""Finds which inputs of a captured program hold row indices: which atoms an edge joins, which edges an angle.

Tensors have one entry, a row, for each atom, edge or angle: these are the *classes of rows*. A class is named by the
size symbol of the program that counts its rows. The program's index operations tell which inputs hold indices of which
class, without any names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

import torch

from lightning_januspipe.capture.trace.graph_walks import descendants
from lightning_januspipe.capture.trace.operators import (
    BATCHED_PRODUCTS,
    KEEPS_VALUES,
    RESHAPES,
    SCATTERS,
    argument,
    index_arguments,
    indices,
    is_pointwise,
    operator_of,
)
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class IndexSource:
    """Tells where indices come from: an input, a part of an input, or an operation that computes them from inputs.

    Attributes:
        position: position of the input; -1 for an operation.
        selected: (dimension, entry) of each selection from the input, in order.
        node: the operation; empty for an input.
    """

    position: int
    selected: tuple[tuple[int, int], ...] = ()
    node: str = ""


@dataclass(frozen=True)
class RowIndex:
    """Describes a tensor of row indices, such as the atom at one end of each edge.

    Attributes:
        source: where the indices come from.
        holder: the class of rows that have one index each, or several: edges, say.
        target: the class of rows that the indices point to: atoms, say.
        writes: whether any operation sums rows by these indices.
        dim: the dimension of the holders' rows.
        is_table: whether each row has several indices, as in a table of the neighbours of each atom.
        slots: where rows and their slots were flattened to one dimension, the number of slots: indices are
            ``row * slots + slot``.
    """

    source: IndexSource
    holder: str
    target: str
    writes: bool
    dim: int = 0
    is_table: bool = False
    slots: int | str = 1


@dataclass(frozen=True)
class IndexUse:
    """Describes one index operation along a dimension of rows.

    Attributes:
        node: the operation.
        dim: the dimension of what it reads or writes.
        symbol: the size symbol of that dimension.
        index: name of the node with the indices.
        source: where these come from; None if they are computed in another way than from inputs alone.
        counts: the size symbol n, where the indices are 0, 1, ..., n - 1.
        slots: see :class:`RowIndex`.
    """

    node: Node
    dim: int
    symbol: str
    index: str
    source: IndexSource | None
    counts: str | None
    slots: int | str = 1


def symbolic(size: int | str) -> str | None:
    """Returns a size that is one symbol; None for constants and expressions."""
    return size if isinstance(size, str) and size.isidentifier() else None


class IndexAnalysis:
    """Finds the index operations of a program, and the classes of rows that follow from them.

    Args:
        program: the captured program.
        nodes: names of the operations of its forward pass, in execution order.
        sizes: values of the size expressions in shapes, on an example batch.
        used: the operations whose indices count; None for all.

    Attributes:
        uses: index operations along dimensions with symbolic sizes.
        row_indices: the tensors of row indices.
        sharded: the classes whose rows are sharded over the ranks, once they are known.
    """

    def __init__(
        self, program: Program, nodes: Sequence[str], sizes: Mapping[str, int], used: Sequence[str] | None = None
    ) -> None:
        self._program, self._example = program, sizes
        self._positions = {name: i for i, name in enumerate(program.inputs)}
        self._on_parameter = descendants(program, program.parameters)
        self._sources: dict[str, IndexSource | None] = {}
        self._same: dict[str, str] = {}
        self.sharded: set[str] = set()
        self.uses = [use for name in (nodes if used is None else used) for use in self._uses(program.by_name[name])]
        for name in nodes:
            self._join_broadcast(program.by_name[name])
            self._join_written(program.by_name[name])
            self._join_sliced(program.by_name[name])
        targets: dict[IndexSource, str] = {}
        slots: dict[IndexSource, int | str] = {}
        for use in self.uses:
            if use.source is not None and slots.setdefault(use.source, use.slots) == use.slots:
                targets[use.source] = self._join(targets.setdefault(use.source, use.symbol), use.symbol)
        written = {u.source for u in self.uses if operator_of(u.node) in SCATTERS}
        self.row_indices = [
            RowIndex(
                source,
                self.class_of(holder),
                self.class_of(target),
                source in written,
                dim,
                any(s != 1 for s in shape[:dim] + shape[dim + 1 :]),
                slots[source],
            )
            for source, target in targets.items()
            for shape in [self._shape(source)]
            for dim, holder in self._holders(shape)
        ]

    def class_of(self, symbol: str) -> str:
        """Returns the class that a size symbol counts: symbols that the same indices point to count one class."""
        while symbol in self._same:
            symbol = self._same[symbol]
        return symbol

    def factor(self, size: int | str) -> tuple[str, int] | None:
        """Returns the sharded class that a size counts, and how many entries each row takes; None if it counts none.

        Raises:
            ValueError: the size is no multiple of a number of rows.
        """
        symbols = _SYMBOL.findall(size) if isinstance(size, str) else []
        rows = [s for s in symbols if s in self._example and self.class_of(s) in self.sharded]
        if not rows:
            return None
        num = 6  # any number; the example may have none
        values = {s: n for s, n in self._example.items() if s.isidentifier()}
        counts = [{s: n for s in values if self.class_of(s) == self.class_of(rows[0])} for n in (num, 2 * num)]
        once, double = (TensorSpec((size,), torch.int64).sizes({**values, **c})[0] for c in counts)
        if double != 2 * once or once % num:
            raise ValueError(f"a size {size}")
        return self.class_of(rows[0]), once // num

    def source(self, name: str) -> IndexSource | None:
        """Returns where a value comes from; None if it is no part of an input, and no index computed from inputs."""
        if name not in self._sources:
            node = self._program.by_name[name]
            found = self._of_input(node)
            if found is None and self._is_computed_index(node):
                found = IndexSource(-1, (), name)
            self._sources[name] = found
        return self._sources[name]

    def counts(self, name: str) -> str | None:
        """Returns the size symbol n of a value that counts 0, 1, ..., n - 1; None for other values."""
        node = self._program.by_name[name]
        first = argument(node, 0)
        if not isinstance(first, Ref):
            return None
        if operator_of(node) in KEEPS_VALUES:
            return self.counts(first.name)
        size = self._program.by_name[first.name]
        if operator_of(node) != "aten.arange" or operator_of(size) != "aten.sym_size":
            return None
        spec = self._program.by_name[size.args[0].name].spec
        return None if spec is None else symbolic(spec.shape[size.args[1]])

    def _is_computed_index(self, node: Node) -> bool:
        """Tells whether a node holds integers for each row, computed from inputs alone: the atom of an angle, say."""
        if node.is_placeholder or node.name in self._on_parameter or node.spec is None:
            return False
        is_integer = node.spec.dtype in (torch.int64, torch.int32)
        return is_integer and any(symbolic(size) is not None for size in node.spec.shape)

    def _of_input(self, node: Node) -> IndexSource | None:
        if node.is_placeholder:
            return IndexSource(self._positions[node.name]) if node.name in self._positions else None
        first = argument(node, 0)
        if not isinstance(first, Ref):
            return None
        if operator_of(node) in KEEPS_VALUES:
            return self.source(first.name)
        if operator_of(node) == "aten.select":
            return self._selected(first.name, node.args[1], node.args[2])
        whole = self._program.by_name[first.name]
        if node.target is getitem and operator_of(whole) == "aten.unbind":
            return self._selected(whole.args[0].name, argument(whole, 1, 0), node.args[1])
        return None

    def _selected(self, name: str, dim: int, entry: int) -> IndexSource | None:
        found, spec = self.source(name), self._program.by_name[name].spec
        if found is None or found.node or spec is None or list(spec.shape) != self._shape(found):
            return None
        return IndexSource(found.position, (*found.selected, (dim % len(spec.shape), entry)))

    def _shape(self, source: IndexSource) -> list[int | str]:
        """Returns the shape of an input's part, or of a computed index."""
        shape = list(self._program.spec(source.node or self._program.inputs[source.position]).shape)
        for dim, _ in source.selected:
            del shape[dim]
        return shape

    def _uses(self, node: Node) -> Iterator[IndexUse]:
        if index_arguments(node) is None:
            return
        spec = self._program.by_name[node.args[0].name].spec
        for dim, index in indices(node) if spec is not None and spec.shape else ():
            assert spec is not None
            symbol, slots = self._rows_and_slots(node.args[0].name, dim % len(spec.shape))
            if symbol is not None:
                source, counts = self.source(index), self.counts(index)
                yield IndexUse(node, dim % len(spec.shape), symbol, index, source, counts, slots)

    def _rows_and_slots(self, name: str, dim: int) -> tuple[str | None, int | str]:
        """Returns the size symbol of a dimension of rows; of rows and slots that were flattened, and how many slots."""
        node, shape = self._program.by_name[name], self._program.spec(name).shape
        symbol = symbolic(shape[dim])
        if symbol is not None or dim or node.is_placeholder or operator_of(node) not in RESHAPES:
            return symbol, 1
        whole = self._program.spec(node.args[0].name).shape
        if len(whole) != len(shape) + 1 or list(whole[2:]) != list(shape[1:]):
            return None, 1
        slots = whole[1]
        is_known = isinstance(slots, int) or slots in self._program.symbols
        return (symbolic(whole[0]), slots) if is_known else (None, 1)

    def _holders(self, shape: Sequence[int | str]) -> list[tuple[int, str]]:
        """Returns dimension and size symbol of the rows that hold indices; nothing where that is not clear."""
        found = [(dim, s) for dim, s in enumerate(map(symbolic, shape)) if s is not None]
        if len(found) > 1:  # a table may have as many columns as there are
            counted = {self.class_of(u.symbol) for u in self.uses}
            found = [(dim, s) for dim, s in found if self.class_of(s) in counted]
        return found if len(found) == 1 else []

    def _join_broadcast(self, node: Node) -> None:
        """Joins the symbols of sizes that an operation takes to be equal, whichever symbols the trace has for them."""
        is_batched = operator_of(node) in BATCHED_PRODUCTS
        if node.spec is None or not (is_batched or is_pointwise(node)):
            return
        shape = node.spec.shape
        for spec in (self._program.by_name[name].spec for name in node.inputs()):
            for back in range(1, 1 + min(len(shape), len(spec.shape) if spec is not None else 0)):
                if spec is not None and (back == len(shape) or not is_batched):
                    self._join_sizes(shape[-back], spec.shape[-back])

    def _join_written(self, node: Node) -> None:
        """Joins the sizes of indices and of the rows that they write: there is one index for each row."""
        operator = operator_of(node)
        if operator not in SCATTERS or operator == "aten.index_put" or not isinstance(argument(node, 3), Ref):
            return
        index, rows = (self._program.by_name[node.args[position].name].spec for position in (2, 3))
        if index is None or rows is None:
            return
        if operator in ("aten.index_add", "aten.index_reduce"):
            self._join_sizes(index.shape[0], rows.shape[node.args[1]])
        else:
            for a, b in zip(index.shape, rows.shape, strict=True):
                self._join_sizes(a, b)

    def _join_sliced(self, node: Node) -> None:
        """Joins the size of a slice that ends at another tensor's size: species of as many atoms as have positions."""
        if operator_of(node) != "aten.slice" or node.spec is None or argument(node, 2) not in (None, 0):
            return
        end, whole = argument(node, 3), self._program.by_name[node.args[0].name].spec
        size = self._program.by_name[end.name] if isinstance(end, Ref) else None
        if size is None or whole is None or operator_of(size) != "aten.sym_size":
            return
        measured = self._program.by_name[size.args[0].name].spec
        if measured is not None:
            self._join_sizes(measured.shape[size.args[1]], whole.shape[argument(node, 1, 0)])

    def _join_sizes(self, a: int | str, b: int | str) -> None:
        if isinstance(a, str) and isinstance(b, str) and a != b and self._example.get(a, 0) == self._example.get(b, 1):
            first, second = self._counting(a), self._counting(b)
            if first is not None and second is not None:
                self._join(first, second)

    def _counting(self, size: str) -> str | None:
        """Returns the one symbol in an expression that has its value on the example batch, if that is more than 1."""
        value = self._example[size]
        symbols = [s for s in _SYMBOL.findall(size) if self._example.get(s) == value and value > 1]
        return symbols[0] if len(symbols) == 1 else None

    def _join(self, a: str, b: str) -> str:
        a, b = self.class_of(a), self.class_of(b)
        if a != b:
            self._same[b] = a
        return a
