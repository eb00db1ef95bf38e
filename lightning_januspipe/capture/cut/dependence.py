"""Where the values of a program lead: to an energy, to its derivative, to what else the loss may read."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem

from lightning_januspipe.capture.cut.cut import Regions
from lightning_januspipe.capture.trace.program import Node, Program, refs, target_function
from lightning_januspipe.engine.specs import Dependence

_LINEAR = {
    *("aten.add.Tensor", "aten.sub.Tensor", "aten.neg.default", "aten.rsub.Scalar", "aten.clone.default"),
    *("aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim", "aten.cat.default"),
    *("aten.stack.default", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default"),
    *("aten.index_add.default", "aten.scatter_add.default", "aten._to_copy.default"),
}
"""Operations whose derivative depends on none of their operands."""

_PRODUCTS = {
    *("aten.mul.Tensor", "aten.div.Tensor", "aten.linear.default", "aten.mm.default", "aten.bmm.default"),
    *("aten.matmul.default", "aten.addmm.default"),
}
"""Operations that are linear in each operand but a divisor, and whose derivatives depend on the other operands."""

_SHAPES = {
    *("aten.zeros_like.default", "aten.ones_like.default", "aten.empty_like.default", "aten.full_like.default"),
    *("aten.new_zeros.default", "aten.new_ones.default", "aten.new_empty.default", "aten.new_full.default"),
}
"""Operations that take a shape and a type from their operand, and no value."""


def dependence_of(program: Program, regions: Regions) -> dict[str, Dependence]:
    """For each value of the body where it leads.

    What autograd saves of an operation decides whether derivatives of the energy depend on an operand; an operation
    that is not known to save none of it counts as one that does. What such an operation stands between then has a
    gradient of zeros where one process has none.
    """
    on_coordinate = program.dependent(program.coordinates)
    energy = set(program.energies)
    forces: set[str] = set()
    observables: dict[str, set[int]] = {}
    for position, name in enumerate(regions.observables):
        observables.setdefault(name, set()).add(position)
    for name in reversed(regions.body):
        node = program.by_name[name]
        for operand in () if node.target in _SHAPES else node.inputs():
            observables.setdefault(operand, set()).update(observables.get(name, ()))
            if name in energy:
                energy.add(operand)
                if name in forces or not _is_linear(node, operand, on_coordinate):
                    forces.add(operand)
    return {
        name: Dependence(name in energy, name in forces, frozenset(observables.get(name, ()))) for name in regions.body
    }


def _is_linear(node: Node, operand: str, on_coordinate: Collection[str]) -> bool:
    """Whether no derivative of the operation with respect to what depends on coordinates depends on the operand."""
    function = target_function(node.target)
    if node.target in _LINEAR or function is getitem or getattr(function, "is_view", False):
        return True
    if node.target not in _PRODUCTS:
        return False
    factors = [r.name for r in refs((node.args, node.kwargs))]
    is_divisor = node.target == "aten.div.Tensor" and factors[0] != operand
    is_squared = factors.count(operand) > 1
    return not (is_divisor or is_squared or any(f in on_coordinate for f in factors if f != operand))
