"""Finds the types of atoms in a captured program: the integers by which rows are looked up in tables of parameters."""

from __future__ import annotations

from lightning_januspipe.capture.trace.graph_walks import ancestors
from lightning_januspipe.capture.trace.operators import GATHERS, indices, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref


def looked_up_by(program: Program, name: str) -> str | None:
    """Returns the name of the row indices that looked a value up in a table of parameters; None for other values.

    A table of parameters does not depend on the program's inputs.

    Args:
        program: the captured program.
        name: the value.
    """
    node = program.by_name[name]
    if node.is_placeholder:
        return None
    index = _index(node)
    if index is None or ancestors(program, [node.args[0].name]) & set(program.inputs):
        return None
    return index


def type_input(program: Program) -> int | None:
    """Returns the position of the input with the types of atoms; None if there is none.

    It is the first input with one integer for each row by which rows of a table of parameters are looked up.

    Args:
        program: the captured program.
    """
    places = {name: position for position, name in enumerate(program.inputs)}
    for node in program.operations:
        index = looked_up_by(program, node.name)
        read = [] if index is None else [n for n in ancestors(program, [index]) if n in places]
        if len(read) == 1:
            spec = program.spec(read[0])
            if len(spec.shape) == 1 and not spec.dtype.is_floating_point:
                return places[read[0]]
    return None


def _index(node: Node) -> str | None:
    operator = operator_of(node)
    if operator == "aten.embedding":
        return str(node.args[1].name)
    if operator not in GATHERS or operator == "aten.gather" or not isinstance(node.args[0], Ref):
        return None
    found = indices(node)
    return found[0][1] if len(found) == 1 and found[0][0] == 0 else None
