"""A stage that runs phase graphs: what does not fit runs eagerly, what is wrong is found before it trains anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from capture_models import Potential, Step, Traced, assert_parity, make_batch
from compiled_models import joint_graphs

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.compiled.compiled_stage import CompiledStage, PhaseRunners
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, phase_graphs
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.schedule import Phase

BATCH = make_batch((2, 5, 3), seed=1)


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Potential(1)))


@pytest.fixture(scope="module")
def captured(traced: Traced) -> CapturedPotential:
    return traced.cut(1)


@pytest.fixture(scope="module")
def graphs(traced: Traced, captured: CapturedPotential) -> PhaseGraphs:
    (joint,) = joint_graphs(traced, captured)
    return phase_graphs(joint)


def stages_of(
    graphs: PhaseGraphs, runners: dict[Phase, Any], made: list[CompiledStage], guards: Sequence[str] = ()
) -> Callable[..., CompiledStage]:
    """Makes stages that are compared with eager ones."""
    sizes = graphs.phases.sizes
    phases = graphs.phases
    if guards:
        phases = type(phases)(**{**vars(phases), "sizes": type(sizes)(sizes.groups, sizes.constants, tuple(guards))})
    runnable = PhaseRunners(phases, {**graphs.modules, **runners}, tolerance=1e-9)

    def make(function: Any, gradients: GradientBuffers, chain: ChainSpec) -> CompiledStage:
        made.append(CompiledStage(function, runnable, gradients, chain))
        return made[-1]

    return make


def test_the_first_micro_batch_is_compared_and_no_other(
    traced: Traced, captured: CapturedPotential, graphs: PhaseGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CompiledStage] = []
    make = stages_of(graphs, {}, made)
    assert_parity(captured, traced.module, BATCH, make_stage=make)
    assert made[0]._runnable.is_verified
    monkeypatch.setattr("lightning_januspipe.compiled.compiled_stage.EagerTwin", None)
    assert_parity(captured, traced.module, make_batch((1, 4), seed=2), make_stage=make)


@pytest.mark.parametrize("phase", [Phase.FE, Phase.FF, Phase.BF, Phase.BE])
def test_a_wrong_phase_is_found(traced: Traced, captured: CapturedPotential, graphs: PhaseGraphs, phase: Phase) -> None:
    """A relative error of 1e-5 in whatever a phase returns first, values and parameter gradients alike."""
    module = graphs.modules[phase]

    def run(*inputs: Any) -> list[torch.Tensor]:
        first, *rest = module(*inputs)
        return [first * (1 + 1e-5), *rest]

    made: list[CompiledStage] = []
    words = "of parameter" if phase in (Phase.BF, Phase.BE) else f"that {phase.value} returns differs"
    with pytest.raises(CaptureError, match=f"stage 0, compiled, .* {words}.* compile=False"):
        assert_parity(captured, traced.module, BATCH, make_stage=stages_of(graphs, {phase: run}, made))


def test_sizes_that_do_not_fit_run_eagerly(traced: Traced, captured: CapturedPotential, graphs: PhaseGraphs) -> None:
    """They are counted, and one warning says why; a micro-batch that fits runs compiled in between."""
    made: list[CompiledStage] = []
    sizes = graphs.phases.sizes
    bound = captured.bind_sizes(captured.inputs(traced.potential)(traced.call_on(BATCH).args, {}))
    size = next(s for s, n in zip(sizes.groups, sizes.values(bound), strict=True) if n == 10)  # atoms
    make = stages_of(graphs, {}, made, guards=[f"{size} != 10"])
    with pytest.warns(UserWarning, match=f"stage 0, .* the condition {size} != 10 does not hold") as caught:
        assert_parity(captured, traced.module, BATCH, make_stage=make)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_parity(captured, traced.module, make_batch((4, 5), seed=2), make_stage=make)
    assert [stage.num_misfits for stage in made] == [1, 0]
    assert not made[0].num_inflight


def test_evaluation_compares_and_forgets(traced: Traced, captured: CapturedPotential, graphs: PhaseGraphs) -> None:
    """FE and FF only, with graphs that keep values for a training step."""
    made: list[CompiledStage] = []
    function = captured.stage(0, traced.potential)
    stage = stages_of(graphs, {}, made)(function, GradientBuffers(), captured.chain)
    tensors = captured.inputs(traced.potential)(traced.call_on(BATCH).args, {})
    _, observables = stage.forward_energy(0, tensors, [])
    _, derivatives = stage.forward_force(0, [], create_graph=False)
    assert stage.num_inflight == 0
    out = traced.potential(BATCH)
    torch.testing.assert_close(derivatives[0], -out["forces"].detach(), rtol=1e-10, atol=1e-12)
    assert any(torch.allclose(y, out["energy"].detach(), rtol=1e-10) for y in observables if y.shape == (3,))
