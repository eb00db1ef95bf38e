"""Walks over a captured program: what values are computed from, what is computed from them, and who reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lightning_januspipe.capture.trace.program import Program


def ancestors(program: Program, names: Iterable[str], given: Collection[str] = frozenset()) -> set[str]:
    """Returns the values that it takes to compute some values, these included.

    Args:
        program: the captured program.
        names: the wanted values.
        given: values that are known: neither these nor what they are computed from is returned.
    """
    found: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in found and name not in given:
            found.add(name)
            stack.extend(program.by_name[name].inputs())
    return found


def descendants(program: Program, names: Iterable[str]) -> set[str]:
    """Returns some values, and all values that are computed from them."""
    found = set(names)
    for node in program.operations:
        if any(i in found for i in node.inputs()):
            found.add(node.name)
    return found


def differentiable(program: Program, names: Iterable[str]) -> set[str]:
    """Returns some values, and all values with a derivative by them: those that follow from them in real numbers."""
    found = set(names)
    for node in program.operations:
        is_real = node.spec is None or node.spec.dtype.is_floating_point or node.spec.dtype.is_complex
        if is_real and any(i in found for i in node.inputs()):
            found.add(node.name)
    return found


def ancestors_of_each(program: Program, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Returns for each of some operations those among them that it takes to compute it, itself included.

    Args:
        program: the captured program.
        names: operations, in execution order.
    """
    found: dict[str, frozenset[str]] = {}
    for name in names:
        parts = [found[i] for i in program.by_name[name].inputs() if i in found]
        found[name] = frozenset((name,)).union(*parts)
    return found


def readers(program: Program, names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Returns for each value the operations that read it, in execution order.

    Args:
        program: the captured program.
        names: the values and operations that count, in execution order; None for all of the program.
    """
    found: dict[str, list[str]] = {name: [] for name in (program.by_name if names is None else names)}
    for name in found:
        for source in program.by_name[name].inputs():
            if source in found:
                found[source].append(name)
    return found


def alive_after_each(program: Program, order: Sequence[str]) -> list[set[str]]:
    """Returns for each of some operations the values that later ones read, when the operations run in this order."""
    last = {name: i for i, name in enumerate(order) for name in program.by_name[name].inputs()}
    found: list[set[str]] = []
    alive: set[str] = set()
    for i, name in enumerate(order):
        alive = {n for n in (*alive, name) if last.get(n, -1) > i}
        found.append(alive)
    return found


def in_order(program: Program, names: Collection[str]) -> list[str]:
    """Returns names of nodes in the program's execution order."""
    return [n.name for n in program.nodes if n.name in names]


def placeholders(program: Program, names: Collection[str]) -> list[str]:
    """Returns the placeholders among some values, in the program's order."""
    return [n.name for n in program.nodes if n.is_placeholder and n.name in names]


def operations(program: Program, names: Collection[str]) -> list[str]:
    """Returns the operations among some values, in execution order."""
    return [n.name for n in program.operations if n.name in names]


def drop_unread(program: Program) -> None:
    """Removes operations that neither the derivative nor an output needs, and size limits of inputs nothing reads."""
    needed = ancestors(program, [program.gradient, *program.outputs, *program.of_batch])
    program.replace_nodes([n for n in program.nodes if n.is_placeholder or n.name in needed])
    read = {i for node in program.operations for i in node.inputs()}
    program.limits = {
        (position, dim): (lower, upper)
        for (position, dim), (lower, upper) in program.limits.items()
        if lower != upper or program.inputs[position] in read
    }


def renamed(names: Sequence[str], new: Mapping[str, str]) -> list[str]:
    """Returns names, with the new ones where there are new ones."""
    return [new.get(name, name) for name in names]
