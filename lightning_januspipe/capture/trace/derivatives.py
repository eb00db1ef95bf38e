"""Merges several calls of ``torch.autograd.grad``, of one energy or of several energies, into one.

∂E₁/∂x and ∂E₂/∂y are both derivatives of E₁ + E₂ where E₁ does not depend on y, and E₂ does not depend on x. Where they
do, E₂ is computed from copies of x and y, so that what both energies are computed from is computed twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

from lightning_januspipe.capture.trace.operators import is_random, is_size, operator_of
from lightning_januspipe.capture.trace.program import Node, Ref, refs, replace_refs
from lightning_januspipe.errors import CaptureError

Place = tuple[str, int]
"""The name of a derivative, and a position in the list that it returns."""


@dataclass
class _Energy:
    """Holds an energy, the tensors that it is differentiated by, and the position of the tensor for each derivative."""

    parts: list[str]
    coordinates: list[str]
    places: dict[Place, int]


def merge_derivatives(nodes: Sequence[Node], marks: Sequence[Node]) -> list[Node]:
    """Merges several derivatives into one derivative of the sum of all energies.

    Args:
        nodes: nodes of a program, in execution order.
        marks: the derivatives among them. The first one stands for all of them afterwards.

    Returns:
        The nodes without the later derivatives, and with copies of what several energies are computed from.

    Raises:
        CaptureError: one is a derivative of another, or no energy depends on what it is differentiated by.
    """
    following = _computed_from(nodes, [m.name for m in marks])
    if any(r.name in following for mark in marks for r in refs(mark.args)):
        raise CaptureError(
            "the potential differentiates a derivative again in its forward (a Hessian, or a gradient of forces), "
            "which is not possible in a pipeline. Call torch.autograd.grad of the energy only."
        )
    before = [n for n in nodes if n.name not in following]
    energies = _energies(before, marks)
    if not energies:
        raise CaptureError(
            f"the potential differentiates {len(marks)} times, each time an energy that does not depend on what it is "
            "differentiated by"
        )
    for i in range(1, len(energies)):
        before += _copies(before, energies, i)
    places: dict[Place, int] = {}
    coordinates: list[Ref] = []
    for energy in energies:
        places |= {place: len(coordinates) + i for place, i in energy.places.items()}
        coordinates += map(Ref, energy.coordinates)
    given = {m.name: [r.name for r in m.args[1]] for m in marks}
    after = [n for n in nodes if n.name in following and n.name not in given]
    for node in after:
        if node.args and isinstance(node.args[0], Ref) and node.args[0].name in given:
            assert node.target is getitem, "derivatives come in a list"
            _, position = place = (node.args[0].name, node.args[1])
            if place in places:
                node.args = (Ref(marks[0].name), places[place])
            else:
                node.target, node.args = "aten.zeros_like.default", (Ref(given[place[0]][position]),)
    marks[0].args = ([Ref(name) for energy in energies for name in energy.parts], coordinates)
    return [*before, marks[0], *after]


def _energies(nodes: Sequence[Node], marks: Sequence[Node]) -> list[_Energy]:
    """Returns the energies that are differentiated, each once, with the coordinates that they depend on."""
    same = _same_values(nodes, {r.name for mark in marks for r in refs(mark.args[1])})
    found: dict[tuple[str, ...], _Energy] = {}
    for mark in marks:
        parts = [r.name for r in refs(mark.args[0])]
        energy = found.setdefault(tuple(same[name] for name in parts), _Energy(parts, [], {}))
        depends_on = _computing(nodes, energy.parts)
        for position, name in enumerate(r.name for r in refs(mark.args[1])):
            if name in depends_on and name not in energy.coordinates:
                energy.coordinates.append(name)
            if name in depends_on:
                energy.places[mark.name, position] = energy.coordinates.index(name)
    return [energy for energy in found.values() if energy.coordinates]


def _same_values(nodes: Sequence[Node], coordinates: Collection[str]) -> dict[str, str]:
    """Returns for each node the first node that computes the same value; coordinates are different tensors."""
    same: dict[str, str] = {}
    known: dict[str, str] = {}
    for node in nodes:
        described = repr((node.target, _renamed(node.args, same), _renamed(node.kwargs, same)))
        is_pure = not node.is_placeholder and not is_random(node) and node.name not in coordinates
        same[node.name] = known.setdefault(described, node.name) if is_pure else node.name
    return same


def _copies(nodes: Sequence[Node], energies: Sequence[_Energy], index: int) -> list[Node]:
    """Makes one energy independent of the coordinates of the others, and these independent of its own.

    Args:
        nodes: the nodes that compute the energies, in execution order.
        energies: the energies; the one at ``index`` gets the names of its copies.
        index: position of the energy.

    Returns:
        The copies, in execution order.
    """
    energy, others = energies[index], [*energies[:index], *energies[index + 1 :]]
    depends_on = _computing(nodes, energy.parts)
    of_others = {c for other in others for c in other.coordinates} & depends_on
    read_by_others = {name for other in others for name in _computing(nodes, other.parts)}
    shared = of_others | read_by_others.intersection(energy.coordinates)
    path = _computed_from([n for n in nodes if n.name in depends_on and _derivative_inputs(n)], shared)
    new: dict[str, str] = {}
    copies = []
    for node in nodes:
        if node.name not in path:
            continue
        name = f"{node.name}_of_energy_{index}"
        if node.is_placeholder:
            copies.append(Node(name, "call_function", "aten.detach.default", (Ref(node.name),), {}, node.spec))
        else:
            args, kwargs = _renamed(node.args, new), _renamed(node.kwargs, new)
            copies.append(Node(name, node.op, node.target, args, kwargs, node.spec))
        new[node.name] = name
    energy.parts = [new.get(name, name) for name in energy.parts]
    energy.coordinates = [new.get(name, name) for name in energy.coordinates]
    return copies


def _computed_from(nodes: Iterable[Node], names: Iterable[str]) -> set[str]:
    found = set(names)
    for node in nodes:
        if not found.isdisjoint(node.inputs()):
            found.add(node.name)
    return found


def _computing(nodes: Sequence[Node], names: Iterable[str]) -> set[str]:
    """Returns the values that some values have a derivative by, these included."""
    found = set(names)
    for node in reversed(nodes):
        if node.name in found:
            found.update(_derivative_inputs(node))
    return found


def _derivative_inputs(node: Node) -> list[str]:
    is_real = node.spec is None or node.spec.dtype.is_floating_point or node.spec.dtype.is_complex
    is_detached = operator_of(node) == "aten.detach" or is_random(node) or is_size(node)
    return node.inputs() if is_real and not is_detached else []


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    return replace_refs(tree, lambda name: Ref(names.get(name, name)))
