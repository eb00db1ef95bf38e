"""Splits a look-up of both ends of edges into one look-up for each end.

``types.index_select(0, edge_index.reshape(-1)).view(edge_index.shape)`` reads rows with a flattened (2, E) input. With
two look-ups, each with one index for each edge, edges can be sharded. ``features[edge_index]`` reads both ends too; its
two look-ups are stacked.
"""

from __future__ import annotations

from operator import getitem

from lightning_januspipe.capture.trace.graph_walks import drop_unread
from lightning_januspipe.capture.trace.operators import GATHERS, RESHAPES, argument, indices, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

_LOOKUP = "aten.index_select.default"


def split_pair_lookups(program: Program) -> Program:
    """``Program -> Program``: makes two look-ups, one for each end of the edges, of one look-up for both ends."""
    nodes: list[Node] = []
    for node in program.nodes:
        found = _end_of_pairs(program, node)
        if found is not None:
            lookup, pairs, dim, entry = found
            index = _end(pairs, dim, entry, f"{node.name}__index")
            nodes.append(index)
            node.target, node.args, node.kwargs = _LOOKUP, (lookup.args[0], 0, Ref(index.name)), {}
        elif (both := _pairs_of(program, node)) is not None:
            ends = [_end(both, 0, entry, f"{node.name}__index{entry}") for entry in (0, 1)]
            spec = program.spec(node.name)
            of_end = TensorSpec(spec.shape[1:], spec.dtype)
            names = [f"{node.name}__end{entry}" for entry in (0, 1)]
            nodes += ends
            for name, end in zip(names, ends, strict=True):
                nodes.append(Node(name, "call_function", _LOOKUP, (node.args[0], 0, Ref(end.name)), {}, of_end))
            node.target, node.args, node.kwargs = "aten.stack.default", (list(map(Ref, names)),), {}
        nodes.append(node)
    if len(nodes) > len(program.nodes):
        program.replace_nodes(nodes)
        drop_unread(program)
    return program


def _end(pairs: Node, dim: int, entry: int, name: str) -> Node:
    """Returns the indices of one end."""
    assert pairs.spec is not None
    rows = TensorSpec(tuple(size for d, size in enumerate(pairs.spec.shape) if d != dim), pairs.spec.dtype)
    return Node(name, "call_function", "aten.select.int", (Ref(pairs.name), dim, entry), {}, rows)


def _pairs_of(program: Program, node: Node) -> Node | None:
    """Returns the (2, E) input with whose indices a node looks the rows of both ends up."""
    if operator_of(node) not in ("aten.index", "aten._unsafe_index") or [dim for dim, _ in indices(node)] != [0]:
        return None
    ((_, index),) = indices(node)
    pairs, spec = program.by_name[index], program.by_name[index].spec
    are_indices = index in program.inputs and spec is not None and not spec.dtype.is_floating_point
    return pairs if are_indices and spec is not None and len(spec.shape) == 2 and spec.shape[0] == 2 else None


def _end_of_pairs(program: Program, node: Node) -> tuple[Node, Node, int, int] | None:
    """Returns the look-up from which a node takes one end, the pairs of indices, and the end's dimension and entry."""
    source = _source(program, node)
    if operator_of(node) == "aten.select":
        view, dim, entry = source, node.args[1], node.args[2]
    elif node.target is getitem and source is not None and operator_of(source) == "aten.unbind":
        view, dim, entry = _source(program, source), argument(source, 1, 0), node.args[1]
    else:
        return None
    found = None if view is None else _look_up(program, view)
    if found is None or not isinstance(dim, int) or not 0 <= dim < 2:
        return None
    return (*found, dim, entry)


def _look_up(program: Program, view: Node) -> tuple[Node, Node] | None:
    """Returns the look-up whose result a view gives the shape of the pairs of indices, and the pairs."""
    lookup = _reshaped(program, view)
    if lookup is None or lookup.spec is None or view.spec is None or operator_of(lookup) not in GATHERS:
        return None
    if operator_of(lookup) == "aten.gather" or [dim for dim, _ in indices(lookup)] != [0]:
        return None
    ((_, index),) = indices(lookup)
    pairs = _reshaped(program, program.by_name[index])
    if pairs is None or pairs.spec is None or pairs.spec.dtype.is_floating_point or len(pairs.spec.shape) != 2:
        return None
    own, viewed = (*pairs.spec.shape, *lookup.spec.shape[1:]), view.spec.shape
    if viewed == own:
        return lookup, pairs
    if viewed[0] == 2 and own[0] in program.symbols and viewed[2:] == own[2:]:
        # The trace has a symbol for the 2 of (2, E) where nothing else that reads the pairs forbids another number.
        program.guards = list(dict.fromkeys((*program.guards, f"Eq({own[0]}, 2)")))
        return lookup, pairs
    return None


def _reshaped(program: Program, node: Node) -> Node | None:
    """Returns the node whose values another one has in another shape."""
    return _source(program, node) if operator_of(node) in RESHAPES else None


def _source(program: Program, node: Node) -> Node | None:
    first = argument(node, 0)
    return program.by_name[first.name] if isinstance(first, Ref) else None
