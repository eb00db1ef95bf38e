"""Lets each layer compute only its own columns of a value that the model computes for all layers at once.

PaiNN's filter network, for example, is one linear layer whose result is split among the interactions. As it stands,
every stage would have to compute all of it, or receive the columns of the later layers, which are per edge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import getitem
from typing import Any

from lightning_januspipe.capture.cut.reorder import num_sums
from lightning_januspipe.capture.trace.graph_walks import descendants, drop_unread, operations, readers
from lightning_januspipe.capture.trace.operators import SPLITS, argument, is_pointwise, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref

Range = tuple[int, int]
"""First column, and the one after the last."""

_SLICE = "aten.slice.Tensor"

_MATRIX_OPERANDS: dict[str, Sequence[int | None]] = {
    "aten.linear": (None, 0, 0),
    "aten.mm": (None, 1),
    "aten.addmm": (-1, None, 1),
}
"""For each operand of a matrix product the dimension that becomes the columns of the result; None where none does."""


def split_shared_linear(program: Program) -> Program:
    """``Program -> Program``: replaces a value that layers read in ranges of columns by one value for each range.

    So are the values that it is computed from, back to matrices of parameters, whose rows or columns are taken. Only
    values that depend on no message are changed, and only where ranges are read after different numbers of layers.

    Args:
        program: the captured program; it is changed.
    """
    body = operations(program, descendants(program, program.parameters))
    sums = num_sums(program, body)
    readers_of = readers(program)
    for name in reversed(body):
        if name in program.by_name and sums[name] == 0 and _Split(program, readers_of, sums).run(name):
            readers_of = readers(program)
    return program


class _Split:
    """Replaces one value by its ranges.

    Args:
        program: the captured program; it is changed.
        readers_of: the operations that read each value.
        sums: how many sums over rows each value depends on; gets the new values.
    """

    def __init__(self, program: Program, readers_of: Mapping[str, Sequence[str]], sums: dict[str, int]) -> None:
        self._program, self._readers, self._sums = program, readers_of, sums
        self._made: dict[tuple[str, int, Range], Node] = {}

    def run(self, name: str) -> bool:
        """Replaces a value, if only ranges of it are read, by different layers; tells whether it did."""
        program = self._program
        dim, ranges = self._ranges(program.by_name[name])
        parts = sorted(set(ranges.values()))
        if len(parts) < 2 or program.results & {name, *ranges}:
            return False
        if len({self._first_layer([r for r, p in ranges.items() if p == part]) for part in parts}) < 2:
            return False
        gone = {name, *ranges, *self._readers[name]}
        new = {part: self._take(name, dim, part, gone) for part in parts}
        made = list(self._made.values())
        if all(node.target == _SLICE for node in made):
            for node in made:
                del program.by_name[node.name]
            return False  # nothing is saved
        nodes: list[Node] = []
        for other in program.nodes:
            if other.name == name:
                nodes.extend(made)
            if other.name not in gone:
                other.rename(lambda n: new[ranges[n]] if n in ranges else n)
                nodes.append(other)
        program.replace_nodes(nodes)
        drop_unread(program)
        self._sums.update({node.name: 0 for node in made})
        return True

    def _first_layer(self, names: Sequence[str]) -> int:
        """Returns after how many layers the first operation that reads one of some values is run."""
        inputs = [self._program.by_name[user].inputs() for name in names for user in self._readers[name]]
        return min((max((self._sums[i] for i in of if i in self._sums), default=0) for of in inputs), default=0)

    def _ranges(self, node: Node) -> tuple[int, dict[str, Range]]:
        """Returns the dimension along which only ranges of a value are read, and the range that each reader takes.

        There are no readers where the value is read in another way too.
        """
        found: dict[str, Range] = {}
        dims = set()
        for user in (self._program.by_name[n] for n in self._readers[node.name]):
            read = _READ_RANGES.get(operator_of(user))
            if read is None or node.spec is None or user.args[0] != Ref(node.name):
                return 0, {}
            ranges = read(self, user, node.spec.shape)
            if not ranges:
                return 0, {}
            found.update(ranges)
            dims.add(argument(user, 1 if operator_of(user) == "aten.slice" else 2, 0) % len(node.spec.shape))
        disjoint = all(a[1] <= b[0] for a, b in pairwise(sorted(set(found.values()))))
        return (dims.pop(), found) if len(dims) == 1 and disjoint else (0, {})

    def _of_slice(self, user: Node, shape: Sequence[int | str]) -> dict[str, Range]:
        size = shape[argument(user, 1, 0)]
        start, stop, step = argument(user, 2) or 0, argument(user, 3), argument(user, 4)
        stop = size if stop is None else stop
        if step not in (None, 1) or not all(isinstance(n, int) for n in (size, start, stop)):
            return {}
        assert isinstance(size, int)
        first, last, _ = slice(start, stop).indices(size)
        return {user.name: (first, last)} if first < last else {}

    def _of_split(self, user: Node, shape: Sequence[int | str]) -> dict[str, Range]:
        sizes = _sizes(operator_of(user), shape[argument(user, 2, 0)], user.args[1])
        found = {}
        for reader in (self._program.by_name[n] for n in self._readers[user.name]):
            if sizes is None or reader.target is not getitem:
                return {}
            first = sum(sizes[: reader.args[1]])
            found[reader.name] = (first, first + sizes[reader.args[1]])
        return found

    def _take(self, name: str, dim: int, part: Range, gone: Collection[str]) -> str:
        """Returns the name of a range of a value.

        Args:
            name: the value.
            dim: dimension of the range.
            part: the range.
            gone: operations that will be gone; where others read the value too, it is computed whole, and sliced.
        """
        if (name, dim, part) not in self._made:
            node = self._program.by_name[name]
            assert node.spec is not None
            changed = None
            if not node.is_placeholder and set(self._readers[name]).issubset(gone):
                changed = self._operands(node, dim, part, {name})
            shape = (*node.spec.shape[:dim], part[1] - part[0], *node.spec.shape[dim + 1 :])
            new = Node(
                f"{name}_columns_{part[0]}_{part[1]}",
                "call_function",
                _SLICE if changed is None else node.target,
                (Ref(name), dim, *part) if changed is None else changed,
                {} if changed is None else node.kwargs,
                replace(node.spec, shape=shape),
            )
            self._program.by_name[new.name] = new
            self._made[name, dim, part] = new
        return self._made[name, dim, part].name

    def _operands(self, node: Node, dim: int, part: Range, gone: Collection[str]) -> tuple[Any, ...] | None:
        """Returns the arguments with which an operation gives a range of its result; None where only slicing does."""
        assert node.spec is not None
        last = len(node.spec.shape) - 1
        operator = operator_of(node)
        if operator == "aten.t":
            return (Ref(self._take(node.args[0].name, 1 - dim, part, gone)),)
        if operator in _MATRIX_OPERANDS:
            if dim != last:
                return None
            columns = zip(node.args, _MATRIX_OPERANDS[operator], strict=False)
            return tuple(a if d is None else self._aligned(a, d, part, gone) for a, d in columns)
        if not is_pointwise(node):
            return None
        # Broadcasting aligns dimensions from the right.
        return tuple(self._aligned(a, dim - last - 1, part, gone) for a in node.args)

    def _aligned(self, arg: Any, dim: int, part: Range, gone: Collection[str]) -> Any:
        """Returns an operand's range; the operand itself where it is broadcast along the dimension."""
        spec = self._program.by_name[arg.name].spec if isinstance(arg, Ref) else None
        if spec is None or len(spec.shape) < -dim:
            return arg
        dim %= len(spec.shape)
        return arg if spec.shape[dim] == 1 else Ref(self._take(arg.name, dim, part, gone))


_READ_RANGES: dict[str, Callable[[_Split, Node, Sequence[int | str]], dict[str, Range]]] = {
    "aten.slice": _Split._of_slice,
    **dict.fromkeys(SPLITS, _Split._of_split),
}
"""For each operator that reads ranges: the range that each of its results holds, by the result's name; or nothing."""


def _sizes(operator: str, size: int | str, given: Any) -> list[int] | None:
    """Returns the sizes of the ranges that an operator splits a dimension into; None where they are not constant."""
    if not isinstance(size, int):
        return None
    if isinstance(given, Sequence):
        return list(given) if all(isinstance(g, int) for g in given) else None
    if not isinstance(given, int) or given < 1:
        return None
    each = -(-size // given) if operator == "aten.chunk" else given
    return [min(each, size - first) for first in range(0, size, each)]
