"""Turns lists of indices whose length depends on values into inputs, computed once for each batch before the stages.

The length of the result of ``nonzero``, of a mask as index (to read or to write rows), and of ``repeat_interleave``
depends on values. If these values depend on no parameter (a neighbour list made in the forward, for example), the
result becomes an input of the program, and the operations that compute it run outside of the stages. So every rank
knows all sizes before it receives a message, and the rows of these inputs can be sharded like rows of other inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_januspipe.capture.trace.graph_walks import descendants, differentiable
from lightning_januspipe.capture.trace.operators import is_of_package
from lightning_januspipe.capture.trace.program import Node, Program, Ref, with_placeholders
from lightning_januspipe.engine.specs import TensorSpec

_ALWAYS = {"aten.nonzero.default", "aten.repeat_interleave.Tensor"}
"""Operations whose results become inputs even if an input has the same length."""

_NAMES = re.compile(r"[A-Za-z_]\w*")


def make_lists_outside(program: Program) -> Program:
    """``Program -> Program``: makes inputs of the lists of indices whose length depends on values.

    Args:
        program: the captured program; it is changed.

    Returns:
        The program. If the trace assumed such a length to equal the size of an input, it gets the symbol of that size,
        and a guard that every batch has to meet.
    """
    aliases = _Masks(program).run()
    _rename(program, aliases)
    _make_inputs(program)
    known = set(program.symbols)
    for a, b in ((aliases.get(a, a), aliases.get(b, b)) for a, b in program.equal_sizes):
        if a != b and {a, b} <= known:
            program.guards.append(f"Eq({a}, {b})")
            made, given = (a, b) if program.symbols[a] > program.symbols[b] else (b, a)
            _rename(program, {made: given})
    return program


class _Masks:
    """Replaces masks as indices by lists of indices, and repeated rows by look-ups of rows."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._nodes: list[Node] = []
        self._lists: dict[tuple[str, str], tuple[list[str], int | str]] = {}
        self._aliases: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Changes the program; returns symbol -> symbol of the same length."""
        program = self._program
        changing = descendants(program, {*program.parameters, program.gradient})
        for node in program.nodes:
            replace_lists = None if node.spec is None else _LISTS.get(node.target)
            if replace_lists is not None:
                replace_lists(self, node, changing)
            self._nodes.append(node)
        program.replace_nodes(self._nodes)
        return self._aliases

    def _select(self, node: Node, changing: set[str]) -> None:
        source, mask = node.args
        if self._spec(source).shape == self._spec(mask).shape:
            self._index(node, changing, [mask])

    def _index(self, node: Node, changing: set[str], given: Sequence[Any] | None = None) -> None:
        given = node.args[1] if given is None else given
        places = [i for i, x in enumerate(given) if x is not None]
        if len(places) != 1 or self._spec(given[places[0]]).dtype != torch.bool or given[places[0]].name in changing:
            return
        (place,) = places
        mask = given[place]
        assert node.spec is not None
        columns = self._columns(mask, node.spec.shape[place])
        node.target, node.args = "aten.index.Tensor", (node.args[0], [*[None] * place, *map(Ref, columns)])

    def _put(self, node: Node, changing: set[str]) -> None:
        source, given, values = node.args[:3]
        places = [i for i, x in enumerate(given) if x is not None]
        if len(places) != 1 or self._spec(given[places[0]]).dtype != torch.bool or given[places[0]].name in changing:
            return
        ((place, mask),) = ((i, given[i]) for i in places)
        num_after = len(self._spec(source).shape) - place - len(self._spec(mask).shape)
        written = self._spec(values).shape
        length = written[-1 - num_after] if len(written) > num_after else 1
        known = self._lists.get(("nonzero", mask.name))
        if not isinstance(length, str):  # the same value for all of them
            length = f"{mask.name}__count" if known is None else known[1]
        columns = self._columns(mask, length)
        node.args = (source, [*[None] * place, *map(Ref, columns)], *node.args[2:])

    def _columns(self, mask: Ref, length: int | str) -> list[str]:
        key = ("nonzero", mask.name)
        if key in self._lists:
            self._same_length(key, length)
            return self._lists[key][0]
        num = len(self._spec(mask).shape)
        made = f"{mask.name}__nonzero"
        self._add(made, "aten.nonzero.default", (mask,), TensorSpec((length, num), torch.int64))
        columns = [f"{made}_{dim}" for dim in range(num)]
        for dim, name in enumerate(columns):
            self._add(name, "aten.select.int", (Ref(made), 1, dim), TensorSpec((length,), torch.int64))
        self._lists[key] = columns, length
        return columns

    def _repeat(self, node: Node, changing: set[str]) -> None:
        source, repeats = node.args[:2]
        shape = self._spec(source).shape
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if repeats.name in changing or (dim is None and len(shape) != 1):
            return
        dim = (dim or 0) % len(shape)
        assert node.spec is not None
        length, key = node.spec.shape[dim], ("repeat", repeats.name)
        if key not in self._lists:
            made = f"{repeats.name}__repeated"
            spec = TensorSpec((length,), self._spec(repeats).dtype)
            self._add(made, "aten.repeat_interleave.Tensor", (repeats,), spec)
            self._lists[key] = [made], length
        self._same_length(key, length)
        (made,) = self._lists[key][0]
        node.target, node.args, node.kwargs = "aten.index_select.default", (source, dim, Ref(made)), {}

    def _same_length(self, key: tuple[str, str], length: int | str) -> None:
        first = self._lists[key][1]
        is_new = isinstance(length, str) and length.isidentifier() and length not in self._program.symbols
        if first != length and is_new and isinstance(first, str):
            self._aliases[str(length)] = self._aliases.get(first, first)

    def _add(self, name: str, target: str, args: tuple[object, ...], spec: TensorSpec) -> None:
        node = Node(name, "call_function", target, args, {}, spec)
        self._nodes.append(node)
        self._program.by_name[name] = node

    def _spec(self, ref: Ref) -> TensorSpec:
        spec = self._program.by_name[ref.name].spec
        assert spec is not None, f"{ref.name} is no tensor"
        return spec


_LISTS: dict[Any, Callable[[_Masks, Node, set[str]], None]] = {
    "aten.index.Tensor": _Masks._index,
    "aten.index_put.default": _Masks._put,
    "aten.masked_select.default": _Masks._select,
    "aten.repeat_interleave.self_Tensor": _Masks._repeat,
}
"""For each operation with a list of indices, or a mask, inside: the function that replaces it."""


def _make_inputs(program: Program) -> None:
    changing = descendants(program, {*program.parameters, program.gradient})
    has_derivative = changing | differentiable(program, program.coordinates)
    of_packages = descendants(program, [n.name for n in program.operations if is_of_package(n)])
    given, known = set(program.symbols), set(program.symbols)
    nodes: list[Node] = []
    made: list[Node] = []
    for node in program.nodes:
        new = _new_symbols(node, known)
        # An operation of a package, which may find edges in another order each time, runs once for each batch.
        is_found = node.name in of_packages and not (known - given).isdisjoint(_shape(node))
        is_list = bool(new) or is_found or node.target in _ALWAYS
        if node.is_placeholder or node.spec is None or node.name in has_derivative or not is_list:
            nodes.append(node)
        else:
            nodes.append(replace(node, name=f"{node.name}__made"))
            made.append(Node(node.name, "placeholder", node.name, (), {}, node.spec))
            program.prepared.append(nodes[-1].name)
            for dim, size in enumerate(node.spec.shape):
                if size in new:
                    program.symbols[str(size)] = (len(program.inputs), dim)
                    known.add(str(size))
            program.inputs.append(node.name)
    program.replace_nodes(with_placeholders(nodes, made))


def _shape(node: Node) -> tuple[int | str, ...]:
    return node.spec.shape if node.spec is not None else ()


def _new_symbols(node: Node, known: set[str]) -> set[int | str]:
    """Returns the sizes of a node that are symbols without an input that defines them."""
    return {s for s in _shape(node) if isinstance(s, str) and s.isidentifier() and s not in known}


def _rename(program: Program, names: dict[str, str]) -> None:
    if not names:
        return

    def renamed(size: int | str) -> int | str:
        return _NAMES.sub(lambda m: names.get(m[0], m[0]), size) if isinstance(size, str) else size

    def changed(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(tuple(map(renamed, spec.shape)), spec.dtype)

    for node in program.nodes:
        node.spec = None if node.spec is None else changed(node.spec)
    program.draws = [replace(draw, spec=changed(draw.spec)) for draw in program.draws]
