"""Finds the operations that every stage can recompute, and the order in which a body is best cut.

Both follow from sizes alone, so that they are the same in every run and on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from lightning_januspipe.capture.trace.graph_walks import readers
from lightning_januspipe.capture.trace.operators import LOOKUPS, is_view, operator_of
from lightning_januspipe.capture.trace.program import Node, Program

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def num_sums(program: Program, body: Sequence[str]) -> dict[str, int]:
    """Returns for each value of the body the number of successive sums over atoms or edges that it depends on.

    Only sums of trainable values count, so that is the number of layers of messages before it. A value after no sum is
    local: a filter network, a trainable radial basis, an embedding of species, or what is computed from them for each
    edge. An operation is a sum if one of its operands has a size symbol that its result lacks.

    Args:
        program: the captured program.
        body: operations, in execution order.
    """
    found: dict[str, int] = {}
    for name in body:
        node = program.by_name[name]
        operands = [program.by_name[i] for i in node.inputs() if i in found]
        found[name] = max((found[o.name] for o in operands), default=0) + any(_sums(node, o) for o in operands)
    return found


def _sums(node: Node, operand: Node) -> bool:
    if operator_of(node) in LOOKUPS or node.spec is None or operand.spec is None:
        return False
    return bool(_symbols(operand) - _symbols(node))


def _symbols(node: Node) -> Counter[str]:
    """Returns the size symbols of a value's shape; a symbol of two dimensions counts twice."""
    assert node.spec is not None
    return Counter(s for size in node.spec.shape if isinstance(size, str) for s in set(_SYMBOL.findall(size)))


def traffic(program: Program, names: Sequence[str], num_bytes: Mapping[str, int]) -> dict[str, float]:
    """Returns the bytes that each operation reads and writes, 0 for views: an estimate of work from sizes alone."""
    found = {}
    for name in names:
        node = program.by_name[name]
        moved = 0 if node.spec is None or is_view(node) else sum(num_bytes.get(i, 0) for i in (name, *node.inputs()))
        found[name] = float(moved)
    return found


def arranged(
    program: Program, body: Sequence[str], free: Collection[str], fixed: Collection[str], num_bytes: Mapping[str, int]
) -> list[str]:
    """Returns the body in an order in which few bytes are alive between operations; operands still come first.

    An operation that turns a large value, which no later operation reads, into a small one moves up to right after that
    value: a readout of each layer that the model evaluates after all layers, for example.

    Args:
        program: the captured program.
        body: operations in execution order.
        free: operations that every stage can repeat; they move down to right before their first use.
        fixed: operations that stay where they are.
        num_bytes: sizes of the values.
    """
    place = {name: float(i) for i, name in enumerate(body)}
    users = readers(program, body)
    moved: set[str] = set()
    for name in body:
        if name in free or name in fixed:
            continue
        operands = [i for i in program.by_name[name].inputs() if i in users and i not in free]
        if not operands:
            continue
        early = max(place[i] for i in operands)
        gained = 0.0
        for operand in operands:
            others = [place[u] for u in users[operand] if u != name]
            gained += num_bytes.get(operand, 0) * max(place[name] - max([*others, early]), 0.0)
        lost = num_bytes.get(name, 0) * (place[name] - early)
        follows = any(i in moved and place[i] == early for i in operands)
        if gained > lost or (gained == lost and follows):
            place[name] = early
            moved.add(name)
    for name in reversed(body):
        if name in free and name not in fixed and users[name]:
            place[name] = min(place[u] for u in users[name])
    for name in body:
        place[name] = max([place[name], *(place[i] for i in program.by_name[name].inputs() if i in users)])
    index = {name: i for i, name in enumerate(body)}
    return sorted(body, key=lambda name: (place[name], index[name]))
