"""Any number of stages gives the parameter gradients of the plain double backward, for many kinds of models."""

from __future__ import annotations

import pytest
import torch
from capture_models import Potential, Step, Traced, assert_parity, eager_gradients, make_batch
from parity_models import CASES, Scaled, Strained

from lightning_januspipe.capture.stages.captured import independent_coordinates
from lightning_januspipe.capture.validate.against_eager import validate_stages


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest) -> Traced:
    return Traced(CASES[request.param]())


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_parameter_gradients(traced: Traced, num_stages: int) -> None:
    captured = traced.cut(num_stages)
    validate_stages(captured, traced.potential, traced.call_on(make_batch((4, 2), seed=2)))
    assert_parity(captured, traced.module, make_batch((2, 5, 1, 3), seed=1))


def test_gradients_follow_the_parameters() -> None:
    """Stages read the live parameters, also after an optimizer step."""
    traced = Traced(Step(Potential(2)))
    captured = traced.cut(2)
    batch = make_batch((3, 4))
    before, _ = eager_gradients(traced.module, batch)
    with torch.no_grad():
        for parameter in traced.module.parameters():
            parameter.mul_(1.1)
    assert eager_gradients(traced.module, batch)[0] != before
    assert_parity(captured, traced.module, batch)


def test_strained_positions_stay_dependent() -> None:
    traced = Traced(Step(Strained(1)))
    assert len(traced.program.coordinates) == 2
    independent = independent_coordinates(traced.program)
    assert independent == [traced.program.coordinates[1]]  # the strain


def test_epilogue_parameters() -> None:
    captured = Traced(Step(Scaled(3))).cut(3)
    assert [captured.program.parameters[n] for n in captured.regions.epilogue_parameters] == ["scale"]
    assert captured.parameter_stages()["scale"] == {0, 1, 2}
