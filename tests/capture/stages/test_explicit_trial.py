"""Parts whose derivatives, evaluation or sizes a trace does not show are found before they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_januspipe.capture import CaptureError
from lightning_januspipe.capture.stages.explicit_trial import Trial
from lightning_januspipe.engine.specs import TensorSpec

DTYPE = torch.float64
SIZES = {"s0": 5, "s1": 7}


class Part(nn.Module):
    """Computes a feature (N, 2) from positions (N, 3), weights of edges (E,), and sources of edges (E,)."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=DTYPE)
        self.function = function

    def run(self, positions: Tensor, weights: Tensor, source: Tensor) -> list[Tensor]:
        h = self.function(self, self.linear(positions), source)
        return [h.index_add(0, source, weights[:, None] * h[source])]


def trial_of(function: Callable[..., Tensor]) -> Trial:
    part = Part(function)
    positions = TensorSpec(("s0", 3), DTYPE)
    specs = [positions, TensorSpec(("s1",), DTYPE), TensorSpec(("s1",), torch.int64)]
    return Trial(part, part.run, specs, [positions], torch.device("cpu"))


def test_made_up_tensors_are_valid() -> None:
    trial = trial_of(lambda _, h, *__: h)
    positions, weights, source = trial.tensors(SIZES)
    assert positions.shape == (5, 3) and weights.shape == source.shape == (7,) and not source.any()
    (cell,) = Trial(trial.parts, trial.run, [TensorSpec(("s0", 3, 3), DTYPE)], [], trial.device).tensors(SIZES)
    assert torch.linalg.det(cell).min() > 0.5


class Straight(torch.autograd.Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _without_gradient(part: Part, h: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.square().mean()
    return h / scale


def _detached(part: Part, h: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        order = source.argsort()  # has no gradient anyway
    return h * h.detach() + order.sum()


def _in_inference(part: Part, h: Tensor, source: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.square().mean()
    return h / scale.clone()


def _hooked(part: Part, h: Tensor, source: Tensor) -> Tensor:
    h.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return h


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda _, h, *__: Straight.apply(h),
            r"its parts have a derivative of their own \(the .* Straight\), which a trace",
        ),
        (_without_gradient, r"its parts switch gradients off \(torch.no_grad\)"),
        (_in_inference, r"its parts switch gradients off"),
        (_hooked, r"its parts change gradients in a hook \(register_hook\)"),
    ],
)
def test_changed_derivatives_are_refused(function: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        trial_of(function).refuse_changed_derivatives(SIZES)
    trial_of(_detached).refuse_changed_derivatives(SIZES)


def test_another_evaluation_is_refused() -> None:
    trial = trial_of(lambda part, h, *__: 1.1 * h if part.training else h)
    trial.parts.linear.eval()
    with pytest.raises(CaptureError, match="its parts compute something else in evaluation mode"):
        trial.refuse_another_evaluation(SIZES)
    assert trial.parts.training and not trial.parts.linear.training
    trial_of(lambda _, h, *__: h).refuse_another_evaluation(SIZES)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda _, h, *__: h, []),
        (lambda _, h, *__: h if len(h) > 1 else 2 * h, ["Ne(s0, 1)"]),
        (lambda _, h, *__: h if len(h) > 1 else h[1], ["Ne(s0, 1)"]),  # an index that is out of range
        (lambda _, h, source: h if len(source) else h + 1, ["Ne(s1, 0)"]),
    ],
)
def test_sizes_that_take_another_branch_are_found(function: Any, expected: list[str]) -> None:
    trial, traced = trial_of(function), trial_of(lambda _, h, *__: h)
    traced.parts.load_state_dict(trial.parts.state_dict())
    assert trial.sizes_that_differ(traced.run, SIZES) == expected
