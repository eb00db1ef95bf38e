"""Splits a look-up of both ends of edges into one look-up for each end.

``types.index_select(0, edge_index.reshape(-1)).view(edge_index.shape)`` reads rows with a flattened (2, E) input. With
two look-ups, each with one index for each edge, edges can be sharded.
"""

from __future__ import annotations

from lightning_januspipe.capture.trace.graph_walks import drop_unread
from lightning_januspipe.capture.trace.operators import operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

_VIEWS = {"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints"}
_INDEX_SELECT = "aten.index_select.default"


def split_pair_lookups(program: Program) -> Program:
    """``Program -> Program`` with a look-up for each end of edges instead of one for both ends.

    Args:
        program: the captured program; it is changed.

    Returns:
        The program.
    """
    nodes: list[Node] = []
    for node in program.nodes:
        found = _end_of_pairs(program, node)
        if found is not None:
            lookup, pairs, dim, place = found
            assert pairs.spec is not None
            index = f"{node.name}__index"
            rows = tuple(size for d, size in enumerate(pairs.spec.shape) if d != dim)
            nodes.append(
                Node(
                    index,
                    "call_function",
                    "aten.select.int",
                    (Ref(pairs.name), dim, place),
                    {},
                    TensorSpec(rows, pairs.spec.dtype),
                )
            )
            node.target, node.args, node.kwargs = _INDEX_SELECT, (lookup.args[0], 0, Ref(index)), {}
        nodes.append(node)
    if len(nodes) > len(program.nodes):
        program.replace_nodes(nodes)
        drop_unread(program)
    return program


def _end_of_pairs(program: Program, node: Node) -> tuple[Node, Node, int, int] | None:
    """Returns the look-up from which a node takes one end, the pairs of indices, and the end's dimension and entry."""
    view: Node | None
    if node.target == "aten.select.int":
        view, dim, place = program.by_name[node.args[0].name], node.args[1], node.args[2]
    elif operator_of(node) == "getitem":
        whole = program.by_name[node.args[0].name]
        if whole.target != "aten.unbind.int":
            return None
        view, dim, place = _source(program, whole), (*whole.args[1:], 0)[0], node.args[1]
    else:
        return None
    found = None if view is None else _look_up(program, view)
    if found is None or not isinstance(dim, int) or not 0 <= dim < 2:
        return None
    return (*found, dim, place)


def _look_up(program: Program, view: Node) -> tuple[Node, Node] | None:
    """Returns the look-up whose result a view gives the shape of the pairs of indices, and the pairs."""
    lookup = _source(program, view) if view.target in _VIEWS else None
    if lookup is None or lookup.spec is None or view.spec is None:
        return None
    if lookup.target == _INDEX_SELECT and lookup.args[1] == 0:
        index = lookup.args[2]
    elif lookup.target == "aten.index.Tensor" and len(lookup.args[1]) == 1:
        index = lookup.args[1][0]
    else:
        return None
    flat = program.by_name[index.name]
    pairs = _source(program, flat) if flat.target in _VIEWS else None
    if pairs is None or pairs.spec is None or pairs.spec.dtype.is_floating_point or len(pairs.spec.shape) != 2:
        return None
    return (lookup, pairs) if view.spec.shape == (*pairs.spec.shape, *lookup.spec.shape[1:]) else None


def _source(program: Program, node: Node) -> Node | None:
    return program.by_name[node.args[0].name] if node.args and isinstance(node.args[0], Ref) else None
