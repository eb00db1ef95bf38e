"""Stages that keep boundaries only: the gradients of the plain double backward, and nothing else in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from toy import CHAINS, assert_close, chain, double_backward, loss_gradients, microbatch

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.recomputing_stage import RecomputingStage, recomputing_stage
from lightning_januspipe.engine.single_process import StageFactory, eager_stage, run_single_process
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import MemoryCosts

run_recomputed = partial(run_single_process, make_stage=recomputing_stage)


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_equal_the_double_backward(name: str, defer: bool) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(1).tensors
    expected = double_backward(functions, tensors)
    result = run_recomputed(functions, spec, tensors, loss_gradients, defer=defer)
    for found, wanted in zip(result.observables, expected.observables, strict=True):
        assert_close(found, wanted, "observable")
    for found, wanted in zip(result.derivatives, expected.derivatives, strict=True):
        assert_close(found, wanted, "derivative")
    for parameter, wanted in expected.gradients.items():
        assert_close(result.gradients.get(parameter), wanted, "gradient")
    for function in functions:
        for weight in function.weights.values():
            assert weight.requires_grad or result.gradients.get(weight) is None, "a frozen weight got a gradient"


def test_only_what_was_received_is_kept() -> None:
    functions, spec = chain(CHAINS["three stages"])
    given = microbatch(1)

    def memory(make_stage: StageFactory) -> list[MemoryCosts]:
        result = run_single_process(
            functions, spec, given.tensors, loss_gradients, measure_memory=True, make_stage=make_stage
        )
        assert result.memory is not None
        return result.memory

    def size(specs: Sequence[TensorSpec]) -> int:
        return sum(torch.Size(s.sizes(given.symbols)).numel() * s.dtype.itemsize for s in specs)

    for function, own, eager in zip(functions, memory(recomputing_stage), memory(eager_stage), strict=True):
        assert own.energy == size(function.boundary_in)
        assert own.force == size(function.boundary_out)
        # u_in and v, and in other stages than the last ∂E/∂h_out, until BE
        assert own.kept == size([*function.boundary_in, *spec.coordinates, *function.boundary_out])
        assert own.total < eager.total


def test_evaluation_and_errors_leave_nothing() -> None:
    functions, _ = chain(CHAINS["two stages"])
    tensors = microbatch(1).tensors
    first = RecomputingStage(functions[0], GradientBuffers())
    plain = Stage(functions[0], GradientBuffers())
    sent = [stage.forward_energy(0, tensors, [])[0] for stage in (first, plain)]
    assert first.num_inflight == 1
    forces = [
        stage.forward_force(0, [h + 1.0 for h in own], create_graph=False)[1]
        for stage, own in zip((first, plain), sent, strict=True)
    ]
    for found, wanted in zip(*forces, strict=True):
        assert_close(found, wanted, "derivative")
    assert first.num_inflight == 0
    first.forward_energy(1, tensors, [])
    first.clear()
    assert first.num_inflight == 0
