"""What of a potential's body any stage can compute for itself, and the order in which its operations are best cut.

All of it follows from sizes alone, so that it is the same in every run and on every machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from operator import getitem

from lightning_januspipe.capture.trace.program import Node, Program, target_function

# Operations that look values up: a size symbol that is lost here was an index, not a sum over atoms or edges.
_LOOKUPS = {
    *("aten.index.Tensor", "aten.index_select.default", "aten.gather.default", "aten.embedding.default"),
    *("aten.repeat_interleave.self_Tensor", "aten.select.int"),
}
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def num_sums(program: Program, body: Sequence[str]) -> dict[str, int]:
    """How many sums over atoms or edges of something trainable each value of the body depends on, one after the other.

    That is how many layers of messages have passed. A value with none is local: filter networks, trainable radial
    bases, embeddings of species and what is made of them for each edge. A sum is seen from a size symbol that one of
    its operands has and its result has not.
    """
    found: dict[str, int] = {}
    for name in body:
        node = program.by_name[name]
        operands = [program.by_name[i] for i in node.inputs() if i in found]
        found[name] = max((found[o.name] for o in operands), default=0) + any(_sums(node, o) for o in operands)
    return found


def _sums(node: Node, operand: Node) -> bool:
    if node.target in _LOOKUPS or node.spec is None or operand.spec is None:
        return False
    return bool(_symbols(operand) - _symbols(node))


def _symbols(node: Node) -> Counter[str]:
    """The size symbols of a value's shape; one that is the size of two dimensions counts twice."""
    assert node.spec is not None
    return Counter(s for size in node.spec.shape if isinstance(size, str) for s in set(_SYMBOL.findall(size)))


def traffic(program: Program, names: Sequence[str], num_bytes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that each operation reads and writes, views none: an estimate of its work that depends on sizes alone."""
    found = {}
    for name in names:
        node = program.by_name[name]
        function = target_function(node.target)
        is_view = node.spec is None or function is getitem or getattr(function, "is_view", False)
        operands = 0 if is_view else sum(num_bytes.get(i, 0) for i in node.inputs())
        found[name] = 0.0 if is_view else float(num_bytes.get(name, 0) + operands)
    return found


def closures(program: Program, names: Collection[str]) -> dict[str, frozenset[str]]:
    """For each value the operations among ``names`` that it takes to compute it, itself included.

    Args:
        program: the traced potential.
        names: operations, in execution order.
    """
    found: dict[str, frozenset[str]] = {}
    for name in names:
        parts = [found[i] for i in program.by_name[name].inputs() if i in found]
        found[name] = frozenset((name,)).union(*parts)
    return found


def arranged(
    program: Program, body: Sequence[str], free: Collection[str], fixed: Collection[str], num_bytes: Mapping[str, int]
) -> list[str]:
    """The body in an order in which little is alive between its operations; each still comes after its operands.

    Args:
        program: the traced potential.
        body: operations in execution order.
        free: operations that any stage can repeat: they come right before their first use.
        fixed: operations that stay where they are.
        num_bytes: sizes of the values.

    Returns:
        The same operations. Those that turn a large value, which nothing after them reads, into a small one come right
        after it: a readout of each layer that the model evaluates after all layers, say.
    """
    place = {name: float(i) for i, name in enumerate(body)}
    users: dict[str, list[str]] = {name: [] for name in body}
    for name in body:
        for source in program.by_name[name].inputs():
            if source in users:
                users[source].append(name)
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
