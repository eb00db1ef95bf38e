"""Merges several calls of ``torch.autograd.grad`` on one energy, such as for forces and then a stress, into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_januspipe.capture.trace.operators import is_random
from lightning_januspipe.capture.trace.program import Node, Ref, refs, replace_refs
from lightning_januspipe.errors import CaptureError


def merge_derivatives(nodes: Sequence[Node], marks: Sequence[Node]) -> list[Node]:
    """Merges several derivatives of one energy into one derivative with more coordinates.

    Args:
        nodes: nodes of a program, in execution order.
        marks: the derivatives among them. The first one gets the coordinates of all.

    Returns:
        The nodes without the later derivatives.

    Raises:
        CaptureError: they are derivatives of different energies, or one is a derivative of another.
    """
    first, later = marks[0], {n.name for n in marks[1:]}
    same: dict[str, str] = {}  # node -> the first node that computes the same value
    known: dict[str, str] = {}
    on_first = {first.name}
    for node in nodes:
        if on_first & set(node.inputs()):
            on_first.add(node.name)
        described = repr((node.target, _renamed(node.args, same), _renamed(node.kwargs, same)))
        is_pure = not node.is_placeholder and not is_random(node)
        same[node.name] = known.setdefault(described, node.name) if is_pure else node.name
    starts = {first.name: 0}
    coordinates = list(first.args[1])
    for mark in marks[1:]:
        energies = [r.name for r in refs(mark.args[0])]
        if on_first & set(energies):
            raise CaptureError(
                "the potential differentiates a derivative again in its forward (a Hessian, or a gradient of forces), "
                "which is not possible in a pipeline. Call torch.autograd.grad of the energy only."
            )
        if [same[n] for n in energies] != [same[r.name] for r in refs(first.args[0])]:
            raise CaptureError(
                f"the potential differentiates {len(marks)} times, and not the same energy: ask for all derivatives in "
                "one call, e.g. torch.autograd.grad(energy.sum(), [positions, strain], create_graph=True)"
            )
        starts[mark.name] = len(coordinates)
        coordinates += mark.args[1]
    first.args = (first.args[0], coordinates)
    for node in nodes:
        if node.args and isinstance(node.args[0], Ref) and node.args[0].name in later:
            assert getattr(node.target, "__name__", "") == "getitem", "derivatives come in a list"
            node.args = (Ref(first.name), starts[node.args[0].name] + node.args[1])
    place = max(i for i, n in enumerate(nodes) if n.name in {r.name for r in coordinates})
    kept = [n for n in nodes if n.name not in later]
    after = next(i for i, n in enumerate(kept) if n is first)
    if place > after:
        raise CaptureError(
            "the potential differentiates its energy again with respect to a tensor that it makes after the first "
            "derivative: make it before, and ask for all derivatives in one torch.autograd.grad"
        )
    return kept


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    return replace_refs(tree, lambda name: Ref(names[name]))
