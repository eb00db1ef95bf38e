"""Rewrites a captured program: inserts exchanges before the operands and after the values of named operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.operators import index_arguments
from lightning_januspipe.capture.trace.program import Node, Program, Ref, replace_refs
from lightning_januspipe.graph import exchange_ops

SizeOf = int | tuple[int, int]
"""A size: a number, or a position of an input and its dimension."""


class Rewrite:
    """Holds a program while exchanges are inserted into it.

    Args:
        program: the captured program, which stays as it is.
        gone: operations whose results become inputs.

    Attributes:
        nodes: operations by name, which may be changed.
    """

    def __init__(self, program: Program, gone: Sequence[str]) -> None:
        self._program, self._gone = program, gone
        self.nodes = {n.name: replace(n) for n in program.nodes}
        self._new: dict[str, list[Node]] = {}
        self._added: dict[tuple[str, str, str, int], str] = {}
        self._with: dict[str, list[str]] = {}
        self._flattened: set[str] = set()

    def give(self, node: Node, name: str, function: Callable[..., Any], rows: str, dim: int = 0) -> None:
        """Lets an operation read the result of an exchange of one of its operands.

        Args:
            node: the operation.
            name: the operand.
            function: the exchange, of :mod:`~lightning_januspipe.graph.exchange_ops`.
            rows: the class of rows that are exchanged.
            dim: their dimension.
        """
        key = (name, function.__name__, rows, dim)
        if key not in self._added:
            added = f"{name}__{function.__name__}" + (f"_{dim}" if dim else "")
            self._added[key] = added
            spec = self._program.by_name[name].spec
            extra = Node(added, "call_function", function, (Ref(name), Ref(exchange_name(rows)), dim), {}, spec)
            self._new.setdefault(node.name, []).append(extra)
        added = self._added[key]
        self._with.setdefault(node.name, []).append(added)

        def swapped(other: str) -> Ref:
            return Ref(added if other == name else other)

        # An index operation reads rows from its first operand; the same tensor may be its indices, which stay.
        if index_arguments(node) is not None and node.args[0].name == name:
            node.args = (swapped(name), *node.args[1:])
        else:
            node.args, node.kwargs = replace_refs(node.args, swapped), replace_refs(node.kwargs, swapped)

    def give_flattened(self, node: Node, name: str, rows: str, sizes: Sequence[SizeOf]) -> None:
        """Lets a look-up read rows whose slots were flattened, with the rows of the halo.

        Args:
            node: the look-up.
            name: what it reads, (rows * slots, ...).
            rows: the class of rows that are exchanged.
            sizes: numbers of own rows and of slots of each.
        """
        last = f"{name}__with_halo"
        spec = self._program.by_name[name].spec
        made: list[Node] = []

        def add(suffix: str, target: Any, *args: Any) -> Ref:
            made.append(Node(f"{name}__{suffix}", "call_function", target, args, {}, spec))
            return Ref(made[-1].name)

        numbers: list[Any] = []
        for what, size in zip(("rows", "slots"), sizes, strict=True):
            if isinstance(size, int):
                numbers.append(size)
            else:
                position, dim = size
                numbers.append(add(what, "aten.sym_size.int", Ref(self._program.inputs[position]), dim))
                made[-1].spec = None
        apart = add("apart", "aten.unflatten.int", Ref(name), 0, numbers)
        extended = add("gather_halo", exchange_ops.gather_halo, apart, Ref(exchange_name(rows)), 0)
        add("with_halo", "aten.flatten.using_ints", extended, 0, 1)
        if name not in self._flattened:
            self._flattened.add(name)
            self._new.setdefault(node.name, []).extend(made)
        self._with.setdefault(node.name, []).extend(n.name for n in made)
        node.args = (Ref(last), *node.args[1:])

    def follow(self, name: str, function: Callable[..., Any], rows: str, dim: int = 0) -> None:
        """Lets what an exchange makes of a value take the value's place; arguments as of :meth:`give`."""
        node = self.nodes[name]
        part = f"{name}__part"
        raw = replace(node, name=part)
        last = Node(name, "call_function", function, (Ref(part), Ref(exchange_name(rows)), dim), {}, node.spec)
        self.nodes[name] = last
        self._new.setdefault(name, []).append(raw)
        self._with.setdefault(name, []).append(part)

    def add_after(self, name: str, function: Callable[..., Any], rows: str) -> Node:
        """Lets an operation sum into zeros, and adds what it summed into to the result of an exchange.

        Args:
            name: the operation, whose first operand is what it sums into.
            function: the exchange.
            rows: the class of rows whose exchange it is.

        Returns:
            The addition, which has taken the place of the operation.
        """
        node = self.nodes[name]
        zeros, part, total = (f"{name}__{what}" for what in ("zeros", "part", "total"))
        self.nodes[name] = Node(name, "call_function", "aten.add.Tensor", (node.args[0], Ref(total)), {}, node.spec)
        self._new.setdefault(name, []).extend(
            (
                Node(zeros, "call_function", "aten.zeros_like.default", (node.args[0],), {}, node.spec),
                replace(node, name=part, args=(Ref(zeros), *node.args[1:])),
                Node(total, "call_function", function, (Ref(part), Ref(exchange_name(rows)), 0), {}, node.spec),
            )
        )
        self._with.setdefault(name, []).extend((zeros, part, total))
        return self.nodes[name]

    def potential(self, captured: CapturedPotential, more: Sequence[str]) -> CapturedPotential:
        """Returns a captured potential with all changes.

        Args:
            captured: the potential whose program this is.
            more: names of inputs to add after the program's own.
        """
        program = self._program
        nodes = [n for n in program.nodes if n.is_placeholder]
        nodes += [Node(name, "placeholder", name, (), {}, None) for name in more]
        for node in program.operations:
            if node.name not in self._gone:
                nodes += [*self._new.get(node.name, []), self.nodes[node.name]]
        regions, cut = captured.regions, captured.cut
        return replace(
            captured,
            program=replace(program, nodes=nodes, inputs=[*program.inputs, *more]),
            regions=replace(regions, body=self.longer(regions.body), geometry=self.longer(regions.geometry)),
            cut=replace(
                cut,
                bodies=[self.longer(b) for b in cut.bodies],
                replicated=[self.longer(r) for r in cut.replicated],
            ),
        )

    def longer(self, names: Sequence[str]) -> list[str]:
        """Returns names of operations, with what was inserted before each, and without what is gone."""
        kept = [name for name in names if name not in self._gone]
        return list(dict.fromkeys(n for name in kept for n in (*self._with.get(name, []), name)))


def exchange_name(rows: str) -> str:
    """Returns the name of the input with the exchange of a class of rows."""
    return f"exchange_{rows}"


def extended_name(name: str) -> str:
    """Returns the name of the input that is another input with the rows of the halo."""
    return f"{name}__with_halo"
