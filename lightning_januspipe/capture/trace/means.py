"""Turns means over the rows of each structure into sums and counts, which can be summed over graph ranks."""

from __future__ import annotations

from lightning_januspipe.capture.trace.operators import is_zero, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec


def split_means(program: Program) -> Program:
    """``Program -> Program``: replaces each ``index_reduce`` that computes means of rows alone by a sum and a count."""
    nodes: list[Node] = []
    for node in program.nodes:
        if operator_of(node) == "aten.index_reduce" and node.args[4] == "mean":
            include_self = node.kwargs.get("include_self", node.args[5] if len(node.args) > 5 else True)
            own, dim, index, rows = node.args[:4]
            if not include_self and node.spec is not None and is_zero(program, own.name):
                nodes += _sums(program, node, own, dim, index, rows)
        nodes.append(node)
    program.replace_nodes(nodes)
    return program


def _sums(program: Program, node: Node, own: Ref, dim: int, index: Ref, rows: Ref) -> list[Node]:
    """Returns operations for the sum and the number of rows of each structure; the node becomes their quotient."""
    of_rows = program.by_name[rows.name].spec
    assert isinstance(node.spec, TensorSpec)
    total, ones, count, least = (f"{node.name}__{part}" for part in ("total", "ones", "count", "least"))
    node.target, node.args, node.kwargs = "aten.div.Tensor", (Ref(total), Ref(least)), {}
    return [
        Node(total, "call_function", "aten.index_add.default", (own, dim, index, rows), {}, node.spec),
        Node(ones, "call_function", "aten.ones_like.default", (rows,), {}, of_rows),
        Node(count, "call_function", "aten.index_add.default", (own, dim, index, Ref(ones)), {}, node.spec),
        Node(least, "call_function", "aten.clamp.default", (Ref(count), 1), {}, node.spec),
    ]
