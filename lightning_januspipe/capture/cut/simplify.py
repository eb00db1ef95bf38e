"""Drops operations that return their input unchanged, and operations that nothing reads.

Each such view costs a node of autograd in every one of the four phases. Products with ones become views, which show
that indices stay indices.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_januspipe.capture.trace.graph_walks import drop_unread, renamed
from lightning_januspipe.capture.trace.operators import KEEPS_VALUES, ONES, argument, operator_of
from lightning_januspipe.capture.trace.program import LARGEST_SIZE, Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec


def simplify(program: Program) -> Program:
    """``Program -> Program``: removes operations that do not change the results.

    Args:
        program: the captured program; it is changed.

    Returns:
        The program, in which ``squeeze`` names the dimensions that it drops, views give every size that is the same
        for every batch, no operation returns its input unchanged, and every operation is read.
    """
    same: dict[str, str] = {}
    kept = []
    for node in program.nodes:
        node.rename(lambda name: same.get(name, name))
        if operator_of(node) == "aten.squeeze":
            _name_dimensions(program, node)
        if operator_of(node) in _VIEWS:
            _give_size(node)
        if operator_of(node) == "aten.mul":
            kept += _without_ones(program, node)
        if _returns_its_input(program, node):
            same[node.name] = node.args[0].name
        else:
            kept.append(node)
    program.replace_nodes(kept)
    for names in (program.outputs, program.sizes, program.energies, program.coordinates):
        names[:] = renamed(names, same)
    program.fixed_values = [(same.get(name, name), fixed) for name, fixed in program.fixed_values]
    drop_unread(program)
    return program


def _name_dimensions(program: Program, node: Node) -> None:
    """Names the dimensions that were dropped in the trace, those that always have one entry.

    ``squeeze`` by itself would also drop the dimension of the structures of a batch with one structure.
    """
    shape = program.spec(node.args[0].name).shape
    given = argument(node, 1, range(len(shape)))
    dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)] if shape else []
    node.target, node.args = "aten.squeeze.dims", (node.args[0], [d for d in dims if shape[d] == 1])


def _without_ones(program: Program, node: Node) -> list[Node]:
    """Makes a product with ones a view of the other factor, converted to the product's type.

    Returns:
        The view before the conversion; nothing where no factor consists of ones in the product's shape.
    """
    factors = [program.by_name[a.name] for a in node.args if isinstance(a, Ref)]
    for ones, other in (factors, factors[::-1]) if len(factors) == 2 else ():
        if _is_one(program, ones) and ones.spec is not None and other.spec is not None and ones.spec == node.spec:
            spec = TensorSpec(node.spec.shape, other.spec.dtype)
            args = (Ref(other.name), Ref(ones.name))
            view = Node(f"{node.name}_view", "call_function", "aten.expand_as.default", args, {}, spec)
            node.target, node.args = "aten._to_copy.default", (Ref(view.name),)
            node.kwargs = {"dtype": node.spec.dtype}
            program.by_name[view.name] = view
            return [view]
    return []


def _is_one(program: Program, node: Node) -> bool:
    """Tells whether every number of a tensor is one."""
    if operator_of(node) in KEEPS_VALUES and isinstance(node.args[0], Ref):
        return _is_one(program, program.by_name[node.args[0].name])
    return operator_of(node) in ONES


_VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape")


def _give_size(node: Node) -> None:
    """Gives the size that a view leaves to be inferred, which torch cannot do on a graph rank that has no rows."""
    sizes = argument(node, 1, [])
    if node.spec is not None and -1 in sizes:
        sizes = [
            s if isinstance(s, int) and isinstance(g, int) else g for g, s in zip(sizes, node.spec.shape, strict=True)
        ]
        node.args = (node.args[0], sizes, *node.args[2:])


def _is_whole(node: Node) -> bool:
    """Tells whether a slice takes a whole dimension."""
    start, stop, step = (argument(node, position) for position in (2, 3, 4))
    full = stop is None or (isinstance(stop, int) and stop >= LARGEST_SIZE)
    return start in (None, 0) and full and step in (None, 1)


def _always(_: Node) -> bool:
    return True


_UNCHANGED: dict[str, Callable[[Node], bool]] = {
    "aten.slice": _is_whole,
    "aten.view": _always,
    "aten._unsafe_view": _always,
    "aten.alias": _always,
    "aten.squeeze": _always,
}
"""Operators that return their input unchanged if shape and type stay, and this holds of the operation."""


def _returns_its_input(program: Program, node: Node) -> bool:
    source = program.by_name[node.args[0].name] if node.args and isinstance(node.args[0], Ref) else None
    if source is None or source.spec is None or source.spec != node.spec:
        return False
    return operator_of(node) in _UNCHANGED and _UNCHANGED[operator_of(node)](node)
