"""Estimates the work of operations in compiled phases, from sizes alone, to balance stages before they are compiled.

Times of eager operations mislead there: a product of many small matrices can take most of an eager stage, and next to
nothing once it is fused with what is around it. What remains in compiled phases are matrix products, and reading and
writing rows where operations cannot be fused: look-ups, and sums. The estimate has no noise, so that a second start has
the same cut, and finds its compiled phases in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_januspipe.capture.cut.cut import Profile
from lightning_januspipe.capture.trace.operators import BATCHED_PRODUCTS, GATHERS, is_view, operator_of
from lightning_januspipe.capture.trace.program import Node, Program, Ref

FLOPS_PER_BYTE = {"cpu": 3.0, "cuda": 20.0}
"""Declared operations in single precision that take as long as a byte that is read or written, by type of device."""

_FUSED = 0.2
"""Declared share of the bytes of a pointwise result that are written, as the others stay within fused loops."""

_MOST_TERMS = 9
"""Longest sum of a product of small matrices that is fused; see ``compiled/small_products.py``."""

_LOOKUPS = GATHERS.keys() | {"aten.embedding"}
_EINSUM = "aten.einsum"
_MAYBE_SMALL = BATCHED_PRODUCTS | {_EINSUM}
_ROWS = {
    **dict.fromkeys(("aten.linear", "aten.mm", "aten.bmm", "aten.matmul", "grouped_linear"), 0),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm"), 1),
}
"""Operators that multiply rows by a matrix -> position of the rows among their arguments."""


def with_compiled_work(program: Program, profile: Profile, device: str) -> Profile:
    """``program, profile -> profile`` with the estimated work in compiled phases, in bytes, in the place of seconds.

    Args:
        program: the captured program.
        profile: the measurements of its operations.
        device: type of the device.
    """
    work = _Work(program, profile, FLOPS_PER_BYTE.get(device, 20.0))
    return replace(profile, seconds={name: work.of(program.by_name[name]) for name in profile.seconds})


class _Work:
    """Estimates the work of operations as bytes that take as long."""

    def __init__(self, program: Program, profile: Profile, flops_per_byte: float) -> None:
        self._program, self._profile, self._flops_per_byte = program, profile, flops_per_byte

    def of(self, node: Node) -> float:
        """Returns the work of an operation."""
        num_bytes = self._profile.num_bytes
        written = num_bytes.get(node.name, 0)
        if not written or node.spec is None or is_view(node):
            return 0.0
        read = [num_bytes.get(name, 0) for name in node.inputs()]
        operator, num_terms = operator_of(node), self._num_terms(node)
        if num_terms:
            if operator in _MAYBE_SMALL and num_terms <= _MOST_TERMS:
                return 0.5 * num_terms * written
            return max(2 * num_terms * written / 4 / self._flops_per_byte, written + sum(read))
        if operator in _LOOKUPS:
            return 2.0 * written
        return float(sum(read)) if max(read, default=0) > written else _FUSED * written

    def _num_terms(self, node: Node) -> int:
        """Returns how many products are added up for each entry of a matrix product; 0 for other operations."""
        operator = operator_of(node)
        if operator == _EINSUM:
            return self._of_einsum(*node.args[:2])
        place = _ROWS.get(operator)
        return 0 if place is None else self._shape(node.args[place])[-1]

    def _of_einsum(self, equation: str, operands: Sequence[Ref]) -> int:
        given, arrow, result = equation.replace(" ", "").partition("->")
        if not arrow:
            result = "".join(letter for letter in set(given) if given.count(letter) == 1)
        sizes: dict[str, int] = {}
        for letters, operand in zip(given.split(","), operands, strict=True):
            before, _, after = letters.partition("...")
            shape = self._shape(operand)
            sizes.update(zip(before, shape, strict=False))
            sizes.update(zip(reversed(after), reversed(shape), strict=False))
        return math.prod(size for letter, size in sizes.items() if letter not in result)

    def _shape(self, operand: Ref) -> tuple[int, ...]:
        spec = self._program.by_name[operand.name].spec
        assert spec is not None, f"{operand.name} is no tensor"
        return spec.sizes(self._profile.sizes)
