"""Changes to a captured program: exchanges before operands, and behind values, by the names of the operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.program import Node, Program, Ref, replace_refs
from lightning_januspipe.graph.index_analysis import GATHERING, SCATTERING


class Rewrite:
    """A program while exchanges are put into it.

    Args:
        program: the captured one, which stays as it is.
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

    def give(self, node: Node, name: str, function: Callable[..., Any], rows: str, dim: int = 0) -> None:
        """Give ``node`` what ``function`` makes of its operand ``name``."""
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

        if node.target in GATHERING or node.target in SCATTERING:  # the indices are other operands
            node.args = (
                (swapped(node.args[0].name), *node.args[1:])
                if node.args[0].name == name
                else tuple(replace_refs(a, swapped) for a in node.args)
            )
        else:
            node.args, node.kwargs = replace_refs(node.args, swapped), replace_refs(node.kwargs, swapped)

    def follow(self, name: str, function: Callable[..., Any], rows: str, dim: int = 0) -> None:
        """Let ``function`` of a value take its place."""
        node = self.nodes[name]
        part = f"{name}__part"
        raw = replace(node, name=part)
        last = Node(name, "call_function", function, (Ref(part), Ref(exchange_name(rows)), dim), {}, node.spec)
        self.nodes[name] = last
        self._new.setdefault(name, []).append(raw)
        self._with.setdefault(name, []).append(part)

    def potential(self, captured: CapturedPotential, more: Sequence[str]) -> CapturedPotential:
        """A captured potential with all changes.

        Args:
            captured: the one that the program is of.
            more: names of inputs after those that there are.
        """
        program, nodes = self._program, []
        placeholders = [Node(name, "placeholder", name, (), {}, None) for name in more]
        is_first = True
        for node in program.nodes:
            if node.name in self._gone:
                continue
            if node.op != "placeholder" and is_first:
                nodes += placeholders
                is_first = False
            nodes += self._new.get(node.name, [])
            nodes.append(self.nodes[node.name])
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
        """Names of operations, with what was inserted before them and without what is gone."""
        found: list[str] = []
        for name in names:
            if name in self._gone:
                continue
            found += [n for n in self._with.get(name, []) if n not in found]
            found.append(name)
        return found


def exchange_name(rows: str) -> str:
    """Name of the input with the exchange of a class."""
    return f"exchange_{rows}"


def extended_name(name: str) -> str:
    """Name of an input with the rows of the halo."""
    return f"{name}__with_halo"
