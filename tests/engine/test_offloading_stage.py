"""Kept values on the host: they leave the device, come back before they are read, and have the right contents then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from capture_models import Potential, Step, Traced, assert_parity, make_batch
from compiled_models import factory, joint_graphs
from torch import Tensor
from toy import CHAINS, LAST, assert_close, chain, double_backward, loss_gradients, microbatch

from lightning_januspipe.compiled.phase_graphs import phase_graphs
from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.host_memory import KeptStorage
from lightning_januspipe.engine.offloading_stage import offloading_stage
from lightning_januspipe.engine.single_process import StageFactory, eager_stage, run_single_process
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Action, Phase, PhaseCosts, Schedule, build_schedule

run_offloaded = partial(run_single_process, make_stage=offloading_stage)
NUM = 3


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_equal_the_double_backward(name: str, defer: bool) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(1).tensors
    expected = double_backward(functions, tensors)
    result = run_offloaded(functions, spec, tensors, loss_gradients, defer=defer)
    for found, wanted in zip(result.derivatives, expected.derivatives, strict=True):
        assert_close(found, wanted, "derivative")
    for parameter, wanted in expected.gradients.items():
        assert_close(result.gradients.get(parameter), wanted, "gradient")


def test_bytes_of_the_device_and_of_the_host() -> None:
    functions, spec = chain(CHAINS["three stages"])
    given = microbatch(1)

    def measured(make_stage: StageFactory) -> tuple[list[float], list[int]]:
        result = run_single_process(
            functions, spec, given.tensors, loss_gradients, measure_memory=True, make_stage=make_stage
        )
        assert result.memory is not None and result.host_bytes is not None
        return [memory.total for memory in result.memory], result.host_bytes

    (own, on_host), (eager, nothing) = measured(offloading_stage), measured(eager_stage)
    assert not any(nothing)
    for device, host, whole in zip(own, on_host, eager, strict=True):
        assert device < 0.7 * whole and host > 0.3 * whole
        assert device + host >= 0.7 * whole


class _Moves:
    """Notes the copies between the device and the host, and how phases find what they read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_return: Callable[[Tensor, Tensor], Any] | None) -> None:
        self.num_out = self.num_back = self.num_late = 0
        self._on_return = on_return or Tensor.copy_
        on_device_now = KeptStorage.on_device_now

        def copy(storage: KeptStorage, source: Tensor, target: Tensor) -> None:
            is_out = target is storage.on_host
            self.num_out += is_out
            self.num_back += not is_out
            target.copy_(source) if is_out else self._on_return(target, source)

        def read(storage: KeptStorage) -> torch.UntypedStorage:
            self.num_late += storage.on_device is None
            return on_device_now(storage)

        monkeypatch.setattr(KeptStorage, "_copy", copy)
        monkeypatch.setattr(KeptStorage, "on_device_now", read)


def run_steps(make_stage: StageFactory, stages: Sequence[Any], spec: Any, schedule: Schedule) -> GradientBuffers:
    """Runs a step of ``NUM`` micro-batches on one rank, twice: nothing may be left of the first."""
    gradients = GradientBuffers()
    made: dict[int, Stage] = {i: make_stage(function, gradients, spec) for i, function in enumerate(stages)}
    executor = Executor(0, made, spec)
    for _ in range(2):
        executor.run(schedule, [microbatch(i) for i in range(NUM)], lambda _, y, p: loss_gradients(y, p))
        assert not any(stage.num_inflight or stage.host_tensors() for stage in made.values())
    return gradients


def schedules() -> dict[str, Schedule]:
    """All micro-batches in flight, and one after the other, phase by phase; the latter with deferred weights."""
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0)
    (order,) = build_schedule("1f1b-fold", 1, NUM, costs).actions
    late = [Action(phase, 0, m) for phase in (Phase.WF, Phase.WE) for m in range(NUM)]
    return {
        "gpipe": build_schedule("gpipe", 1, NUM, costs),
        "one by one": Schedule("1f1b-fold", 1, NUM, (order,)),
        "deferred": Schedule("deferred", 1, NUM, ((*order, *late),)),
    }


@pytest.mark.parametrize("order", ["gpipe", "one by one", "deferred"])
def test_values_come_back_during_the_action_before(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    (function,), spec = chain([LAST])
    expected = run_steps(eager_stage, [function], spec, schedules()[order])
    moves = _Moves(monkeypatch, None)
    found = run_steps(offloading_stage, [function], spec, schedules()[order])
    assert moves.num_late == 0, "a phase waited for its values"
    assert (moves.num_back > 0) == (order != "one by one"), "all values of FE are read by FF, and those of FF by BF"
    assert moves.num_back <= 3 * moves.num_out
    for parameter in function.parameters:
        assert_close(found.get(parameter), expected.get(parameter), "gradient")


def test_compiled_values_come_back_during_the_action_before(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced(Step(Potential(2)))
    captured = traced.cut(1)
    graphs = [phase_graphs(joint, "offload") for joint in joint_graphs(traced, captured)]
    made: list[Any] = []
    moves = _Moves(monkeypatch, None)
    assert_parity(captured, traced.module, make_batch((2, 5), seed=1), make_stage=factory(graphs, made))
    assert moves.num_out and moves.num_back and not made[0].host_tensors()


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_values_that_do_not_come_back_are_noticed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The copy to the device is left out, so that the phase would read zeros."""
    traced = Traced(Step(Potential(2)))
    captured = traced.cut(2)
    make: Any = offloading_stage
    if kind == "compiled":
        make = factory([phase_graphs(joint, "offload") for joint in joint_graphs(traced, captured)])
    assert_parity(captured, traced.module, make_batch((2, 5), seed=1), make_stage=make)
    _Moves(monkeypatch, lambda target, source: target.zero_())
    with pytest.raises((AssertionError, FloatingPointError)):
        assert_parity(captured, traced.module, make_batch((2, 5), seed=1), make_stage=make)
