"""Finds what depends on each value of a program: the energy, its derivative, or what else the loss may read."""

from __future__ import annotations

from collections.abc import Collection

from lightning_januspipe.capture.cut.cut import Regions
from lightning_januspipe.capture.trace.graph_walks import descendants
from lightning_januspipe.capture.trace.operators import LINEAR, PRODUCTS, SHAPE_ONLY, is_view, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, refs
from lightning_januspipe.engine.specs import Dependence


def dependence_of(program: Program, regions: Regions) -> dict[str, Dependence]:
    """``Program, Regions -> {name: Dependence}``: finds what depends on each value of the body.

    The derivative of an energy depends on an operand if autograd saves the operand. An operation counts as saving its
    operands unless it is known not to. A wrong guess costs little: a parameter then gets a gradient of zeros in a
    pipeline where it gets none in a single process.
    """
    on_coordinate = descendants(program, program.coordinates)
    energy = set(program.energies)
    forces: set[str] = set()
    observables: dict[str, set[int]] = {}
    for position, name in enumerate(regions.observables):
        observables.setdefault(name, set()).add(position)
    for name in reversed(regions.body):
        node = program.by_name[name]
        for operand in () if operator_of(node) in SHAPE_ONLY else node.inputs():
            observables.setdefault(operand, set()).update(observables.get(name, ()))
            if name in energy:
                energy.add(operand)
                if name in forces or not _is_linear(node, operand, on_coordinate):
                    forces.add(operand)
    return {
        name: Dependence(name in energy, name in forces, frozenset(observables.get(name, ()))) for name in regions.body
    }


def _is_linear(node: Node, operand: str, on_coordinate: Collection[str]) -> bool:
    """Tells whether no derivative with respect to an operand that depends on coordinates depends on this operand."""
    operator = operator_of(node)
    if operator in LINEAR or is_view(node):
        return True
    if operator not in PRODUCTS:
        return False
    factors = [r.name for r in refs((node.args, node.kwargs))]
    is_divisor = operator == "aten.div" and factors[0] != operand
    is_squared = factors.count(operand) > 1
    return not (is_divisor or is_squared or any(f in on_coordinate for f in factors if f != operand))
