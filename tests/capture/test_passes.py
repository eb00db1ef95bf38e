"""Every pass leaves a program that gives the same results, and the list of them is what capture applies."""

from __future__ import annotations

import copy

import pytest
import torch
from capture_models import Step, Traced, make_batch
from cut_models import SharedFilters

from lightning_januspipe.capture.cut.simplify import simplify
from lightning_januspipe.capture.cut.split_shared_linear import split_shared_linear
from lightning_januspipe.capture.find.grad_call import call_arguments
from lightning_januspipe.capture.passes import PASSES, apply_passes
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.capture.trace.graph_walks import operations
from lightning_januspipe.capture.trace.program import Program
from lightning_januspipe.capture.trace.trace import trace_potential


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(SharedFilters(3)))


@pytest.fixture(scope="module")
def raw(traced: Traced) -> Program:
    """The program as tracing leaves it."""
    return trace_potential(traced.potential, traced.call, traced.format)


def results(traced: Traced, program: Program) -> list[torch.Tensor]:
    """Energies and strained positions of a batch with other sizes than the traced one."""
    names = [*program.energies, *program.coordinates]
    function = ProgramFunction(program, traced.potential, {n.name for n in program.operations}, names)
    args, kwargs = call_arguments(traced.module, traced.call.path, traced.module.training_step, make_batch((2, 6)))
    return [x.detach() for x in function(traced.format.bind(traced.call.path, args, kwargs))]


def test_each_pass_keeps_the_results(traced: Traced, raw: Program) -> None:
    program = copy.deepcopy(raw)
    expected = results(traced, program)
    assert len(expected) > 1
    changing = set()
    for apply in PASSES:
        before = [n.name for n in program.operations]
        program = apply(program)
        if [n.name for n in program.operations] != before:
            changing.add(apply)
        torch.testing.assert_close(results(traced, program), expected, rtol=1e-13, atol=1e-13)
        assert program.inputs == raw.inputs and program.symbols == raw.symbols
    assert changing == {simplify, split_shared_linear}, "the passes that find their pattern in this program"


def test_a_pass_finds_nothing_more_after_all_of_them(traced: Traced, raw: Program) -> None:
    """Capture's program is the traced one after all passes, and applying them again changes nothing."""
    program = apply_passes(copy.deepcopy(raw))
    names = [n.name for n in program.nodes]
    assert names == [n.name for n in traced.program.nodes]
    assert [n.name for n in apply_passes(program).nodes] == names


def test_tracing_applies_no_pass(raw: Program) -> None:
    read = {i for n in raw.operations for i in n.inputs()} | {raw.gradient, *raw.outputs}
    assert any(name not in read for name in operations(raw, raw.by_name)) or any(
        n.target == "aten.slice.Tensor" for n in raw.operations
    ), "a trace holds operations that the passes drop"
