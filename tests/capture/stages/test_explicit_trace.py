"""Parts that a model declares become operations that can be compiled, or are refused with a reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from capture_models import OTHER, TRACED, Batch, Step, make_batch
from explicit_models import Features, LooksUp, SelfDividing
from torch import Tensor, nn

from lightning_januspipe.capture import CaptureError, capture_module
from lightning_januspipe.capture.stages.explicit import TraceableExplicitStage
from lightning_januspipe.engine.specs import StageOutput


def stages_of(potential: nn.Module, num_stages: int = 3) -> list[TraceableExplicitStage]:
    module = Step(potential)
    batches = make_batch(TRACED), make_batch(OTHER)
    found = capture_module(module, module.training_step, *batches, [list(range(num_stages))], stages="explicit")
    return [found.potential.stage(i, potential) for i in range(num_stages)]


def tensors_of(batch: Batch, potential: LooksUp) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in potential.stage_inputs(batch).values()]


@pytest.mark.parametrize("sizes", [OTHER, (4,), (1,), (1, 3, 2)])
def test_a_body_computes_what_the_parts_do(sizes: tuple[int, ...]) -> None:
    potential = LooksUp()
    tensors = tensors_of(make_batch(sizes), potential)
    boundary: list[Tensor] = []
    for stage in stages_of(potential):
        body = pickle.loads(pickle.dumps(stage.body))
        expected, found = stage(tensors, boundary), body(stage.values(tensors), boundary)
        for name in ("boundary", "energies", "observables", "coordinates"):
            pairs = zip(getattr(expected, name), getattr(found, name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert gradients(expected, stage) == gradients(found, stage)
        boundary = [x.detach() for x in expected.boundary]


def gradients(out: StageOutput, stage: TraceableExplicitStage) -> list[Any]:
    """Returns the gradients of a stage's results by its coordinates and parameters, as lists."""
    total = sum(x.sin().sum() for x in (*out.energies, *out.boundary, *out.observables))
    found = torch.autograd.grad(total, [*out.coordinates, *stage.parameters], allow_unused=True)
    return [None if g is None else g.tolist() for g in found]


def test_equal_layers_have_one_text() -> None:
    texts = [stage.body.text() for stage in stages_of(LooksUp(), 6)]
    assert len(set(texts)) == 3 and texts[1] == texts[4]


def test_live_parameters_are_read() -> None:
    potential = LooksUp()
    stage = stages_of(potential)[0]
    tensors = tensors_of(make_batch(OTHER), potential)
    first = [x.clone() for x in stage.body(stage.values(tensors), []).boundary]
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(2)
    assert not torch.equal(first[0], stage.body(stage.values(tensors), []).boundary[0])
    assert torch.equal(stage(tensors, []).boundary[0], stage.body(stage.values(tensors), []).boundary[0])


class _Changed(nn.Module):
    """Changes what a part returns."""

    def __init__(self, part: nn.Module, change: Any) -> None:
        super().__init__()
        self.part, self._change = part, change

    def forward(self, inputs: Features, features: Features) -> Features:
        return {"h": self._change(self.part(inputs, features)["h"], inputs)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, inputs: sum(h * (inputs["index"] == i)[:, None] for i in range(len(inputs["strain"]))), "'strain'"),
        (lambda h, inputs: h * torch.bincount(inputs["species"])[inputs["species"], None], "sizes depend on values"),
        (lambda h, inputs: h + 0.0 * torch.rand_like(h), "draw random numbers"),
        (lambda h, inputs: h * float(inputs["species"].max() >= 0), "read values from tensors"),
        (lambda h, inputs: h + sum(0.0 for _ in inputs["species"].tolist()), "a list of values"),
    ],
)
def test_refused(change: Any, words: str) -> None:
    potential = LooksUp()
    potential.parts[1] = _Changed(potential.parts[1], change)
    first, second, *_ = stages_of(potential, 6)
    assert first.body.text()
    with pytest.raises(CaptureError, match=words):
        _ = second.body


@pytest.mark.parametrize(
    ("change", "conditions"),
    [
        (lambda h, inputs: h * max(1.0, 2.0 - (len(h) > 9 * len(inputs["strain"]))), ("s0 <= 9*s2",)),
        (lambda h, inputs: h * (1.0 if len(h) > 3 else 1.5), ("s0 >= 4", "s0 > 3", "Ne(s0, 1)")),
        (lambda h, inputs: h * (1.5 if len(inputs["strain"]) == 1 else 1.0), ("Ne(s2, 1)",)),
        (lambda h, inputs: h * (1.0 if inputs["edges"].numel() else 1.5), ("Ne(s1, 0)",)),
        (lambda h, inputs: torch.cat([h, h]).T.contiguous().T[: len(h)], ()),
        (lambda h, inputs: h * inputs["cell"].inverse().square().sum((1, 2))[inputs["index"], None], ()),
    ],
)
def test_a_trace_tells_for_which_sizes_it_is_right(change: Any, conditions: tuple[str, ...]) -> None:
    potential = LooksUp()
    potential.parts[1] = _Changed(potential.parts[1], change)
    stages = stages_of(potential, 6)
    assert stages[1].body.conditions == conditions
    assert not any(stage.body.conditions for stage in (stages[0], *stages[2:]))
    assert not conditions or conditions[0] in stages[1].body.text()


class _Noting(nn.Module):
    """Counts its calls in attributes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.num_calls = part, 0
        self.seen: list[Tensor] = []

    def forward(self, inputs: Features, features: Features) -> Features:
        self.num_calls += 1
        self.seen.append(features["h"])
        return self.part(inputs, features)


def test_the_live_parts_stay_as_they_are() -> None:
    potential = SelfDividing()
    potential.parts[1] = noting = _Noting(potential.parts[1])
    potential.parts[2].eval()
    before = {name: module.training for name, module in potential.named_modules()}
    stages = stages_of(potential, 5)
    num_calls, seen = noting.num_calls, list(noting.seen)
    for stage in stages[1:]:
        assert stage.body.text()
    assert noting.num_calls == num_calls and noting.seen == seen
    assert {name: module.training for name, module in potential.named_modules()} == before
