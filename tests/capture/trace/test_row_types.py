"""The types of atoms are the integers by which rows of tables are looked up."""

from __future__ import annotations

import pytest
from capture_models import Potential, Step, Traced
from expert_workers import Experts

from lightning_januspipe.capture.trace.operators import operator_of
from lightning_januspipe.capture.trace.row_types import looked_up_by, type_input


@pytest.mark.parametrize("make", [Potential, Experts])
def test_the_input_with_the_types_is_found(make: type[Potential]) -> None:
    traced = Traced(Step(make(1)))
    position = type_input(traced.program)
    assert position is not None
    assert "species" in traced.format.tensors[position]


def test_the_experts_of_a_row_are_looked_up_by_its_element() -> None:
    program = Traced(Step(Experts(1))).program
    products = [n for n in program.operations if operator_of(n) == "januspipe.grouped_linear"]
    found = {looked_up_by(program, n.args[2].name) for n in products}
    assert None not in found and "tensors_6" in found  # of edges in each layer, and of atoms
    assert looked_up_by(program, products[0].name) is None
