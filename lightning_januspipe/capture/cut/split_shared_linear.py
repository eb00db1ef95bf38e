"""Lets each layer compute just its own columns of what a model computes for all layers at once.

PaiNN's filter network, for example, is one linear layer whose result is split among the interactions. As it stands,
every stage would have to compute all of it, or receive the columns of the later layers, which are per edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import getitem
from typing import Any

import torch

from lightning_januspipe.capture.cut.reorder import num_sums
from lightning_januspipe.capture.trace.program import Node, Program, Ref, replace_refs, target_function

_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
_SLICE = "aten.slice.Tensor"


def split_shared_linear(program: Program) -> Program:
    """Compute values that are split among layers in parts, where the parts together cost as much as the whole.

    A value of which layers read constant ranges of columns, one after another, is replaced by a value for each range;
    so is what it is computed from, up to matrices of parameters, of which the rows or columns are taken. Only values
    that depend on no message are changed, and only where ranges are read after different numbers of layers.

    Args:
        program: the traced potential; it is changed.
    """
    reached = set(program.parameters)
    for node in program.nodes:
        if node.op != "placeholder" and any(i in reached for i in node.inputs()):
            reached.add(node.name)
    body = [n.name for n in program.nodes if n.op != "placeholder" and n.name in reached]
    sums = num_sums(program, body)
    for name in reversed(body):
        if name in program.by_name and sums[name] == 0:
            _split(program, name, sums)
    return program


def _split(program: Program, name: str, sums: dict[str, int]) -> None:
    """Replace a value by its ranges, if only ranges of it are read, by different layers."""
    node = program.by_name[name]
    dim, ranges = _ranges(program, node)
    if len(set(ranges.values())) < 2 or _is_kept(program, {name, *ranges}):
        return
    layers = {
        part: min((_layer(program, user, sums) for reader in readers for user in _users(program, reader)), default=0)
        for part in set(ranges.values())
        for readers in [[reader for reader, p in ranges.items() if p == part]]
    }
    if len(set(layers.values())) < 2:
        return
    made: list[Node] = []
    parts = _Parts(program, made)
    new = {part: parts.take(name, dim, part, {*_users(program, name), *ranges}) for part in sorted(layers)}
    if all(target.target == _SLICE for target in made):
        return  # nothing is saved
    renamed = {reader: new[part] for reader, part in ranges.items()}
    gone = {name, *renamed, *_users(program, name)}
    nodes: list[Node] = []
    for other in program.nodes:
        if other.name == name:
            nodes.extend(made)
        if other.name not in gone:
            other.args = replace_refs(other.args, lambda n: Ref(renamed.get(n, n)))
            other.kwargs = replace_refs(other.kwargs, lambda n: Ref(renamed.get(n, n)))
            nodes.append(other)
    program.nodes = nodes
    _drop_unused(program)
    for new_node in made:
        sums[new_node.name] = 0


def _layer(program: Program, user: str, sums: dict[str, int]) -> int:
    """After how many layers an operation is run: what its operands depend on."""
    return max((sums[i] for i in program.by_name[user].inputs() if i in sums), default=0)


def _users(program: Program, name: str) -> list[str]:
    return [n.name for n in program.nodes if n.op != "placeholder" and name in n.inputs()]


def _is_kept(program: Program, names: set[str]) -> bool:
    return bool(names & {*program.outputs, *program.on_batch, *program.energies, *program.coordinates})


def _ranges(program: Program, node: Node) -> tuple[int, dict[str, tuple[int, int]]]:
    """The dimension along which only ranges of a value are read, and the first and last column of each reader.

    No readers where the value is read in another way too.
    """
    found: dict[str, tuple[int, int]] = {}
    dims = set()
    for user in (program.by_name[n] for n in _users(program, node.name)):
        if node.spec is None or user.args[0] != Ref(node.name):
            return 0, {}
        if user.target == _SLICE:
            given: list[Any] = [*user.args[1:], *(0, None, None, 1)[len(user.args) - 1 :]]
            dim = given[0] % len(node.spec.shape)
            part = _bounds(node.spec.shape[dim], *given[1:])
            if part is None:
                return 0, {}
            found[user.name] = part
        elif user.target in _SPLITS:
            dim = (user.args[2] if len(user.args) > 2 else 0) % len(node.spec.shape)
            sizes = _sizes(user.target, node.spec.shape[dim], user.args[1])
            if sizes is None:
                return 0, {}
            for reader in (program.by_name[n] for n in _users(program, user.name)):
                if reader.target is not getitem:
                    return 0, {}
                first = sum(sizes[: reader.args[1]])
                found[reader.name] = (first, first + sizes[reader.args[1]])
        else:
            return 0, {}
        dims.add(dim)
    parts = sorted(set(found.values()))
    is_apart = all(a[1] <= b[0] for a, b in pairwise(parts))
    return (dims.pop(), found) if len(dims) == 1 and is_apart else (0, {})


def _bounds(size: int | str, start: Any, stop: Any, step: Any) -> tuple[int, int] | None:
    if not isinstance(size, int) or step not in (None, 1):
        return None
    start, stop = start or 0, size if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    first, last, _ = slice(start, stop).indices(size)
    return (first, last) if first < last else None


def _sizes(target: str, size: int | str, given: Any) -> list[int] | None:
    if not isinstance(size, int):
        return None
    if isinstance(given, Sequence):
        return list(given) if all(isinstance(g, int) for g in given) else None
    if not isinstance(given, int) or given < 1:
        return None
    each = -(-size // given) if target == "aten.chunk.default" else given
    return [min(each, size - first) for first in range(0, size, each)]


class _Parts:
    """Makes the operations that compute ranges of values.

    Args:
        program: the traced potential.
        made: gets the new operations, in order.
    """

    def __init__(self, program: Program, made: list[Node]) -> None:
        self._program, self._made = program, made
        self._known: dict[tuple[str, int, tuple[int, int]], str] = {}

    def take(self, name: str, dim: int, part: tuple[int, int], readers: set[str]) -> str:
        """The name of a range of a value.

        Args:
            name: the value.
            dim: dimension of the range.
            part: its first column, and the one after its last.
            readers: operations that will be gone; where others read the value too, it is computed whole, and sliced.
        """
        key = (name, dim, part)
        if key not in self._known:
            node = self._program.by_name[name]
            assert node.spec is not None
            changed = None
            if node.op != "placeholder" and set(_users(self._program, name)) <= readers:
                changed = self._operands(node, dim, part, {name})
            target, args = changed or (_SLICE, (Ref(name), dim, *part))
            shape = (*node.spec.shape[:dim], part[1] - part[0], *node.spec.shape[dim + 1 :])
            new = Node(
                f"{name}_columns_{part[0]}_{part[1]}",
                "call_function",
                target,
                args,
                node.kwargs if changed else {},
                replace(node.spec, shape=shape),
            )
            self._program.by_name[new.name] = new
            self._made.append(new)
            self._known[key] = new.name
        return self._known[key]

    def _operands(self, node: Node, dim: int, part: tuple[int, int], readers: set[str]) -> tuple[Any, Any] | None:
        """Target and arguments that give a range of an operation's result; None where only slicing does."""
        assert node.spec is not None
        last = len(node.spec.shape) - 1
        columns = {
            "aten.linear.default": (None, 0, 0),
            "aten.mm.default": (None, 1),
            "aten.addmm.default": (-1, None, 1),
        }
        if node.target == "aten.t.default":
            return node.target, (Ref(self.take(node.args[0].name, 1 - dim, part, readers)),)
        if node.target in columns:
            if dim != last:
                return None
            return node.target, tuple(
                arg if d is None or not isinstance(arg, Ref) else self._aligned(arg, d, part, readers)
                for arg, d in zip(node.args, columns[node.target], strict=False)
            )
        function = target_function(node.target)
        if torch.Tag.pointwise not in getattr(function, "tags", ()):
            return None
        # Broadcasting aligns dimensions from the right.
        return node.target, tuple(self._aligned(a, dim - last - 1, part, readers) for a in node.args)

    def _aligned(self, arg: Any, dim: int, part: tuple[int, int], readers: set[str]) -> Any:
        """An operand's range; the operand itself where it is broadcast along the dimension."""
        spec = self._program.by_name[arg.name].spec if isinstance(arg, Ref) else None
        if spec is None or len(spec.shape) < -dim:
            return arg
        dim %= len(spec.shape)
        return arg if spec.shape[dim] == 1 else Ref(self.take(arg.name, dim, part, readers))


def _drop_unused(program: Program) -> None:
    alive = {program.gradient, *program.outputs, *program.on_batch}
    for node in reversed(program.nodes):
        if node.name in alive:
            alive.update(node.inputs())
    program.nodes = [n for n in program.nodes if n.op == "placeholder" or n.name in alive]
    program.by_name = {n.name: n for n in program.nodes}
