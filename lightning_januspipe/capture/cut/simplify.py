"""Drops operations that return their input unchanged, and operations that nothing reads.

Each such view costs a node of autograd in every one of the four phases.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_januspipe.capture.trace.graph_walks import drop_unread, renamed
from lightning_januspipe.capture.trace.operators import argument, operator_of
from lightning_januspipe.capture.trace.program import LARGEST_SIZE, Node, Program, Ref


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
