"""Potentials that divide themselves: same proofs as for captured ones, and clear words about what is missing."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from capture_models import OTHER, TRACED, Batch, Potential, Step, assert_parity, make_batch
from explicit_models import Features, SelfDividing
from torch import Tensor, nn

from lightning_januspipe.capture import Capture, CaptureError, ExplicitStages, capture_module


class LossOfCharges(Step):
    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch)
        forces, stress = (out["forces"] - batch["forces"]).square().mean(), (out["stress"] - batch["stress"]).square()
        energy = (out["energy"] - batch["energy"]).square().mean()
        return energy + forces + 10 * stress.mean() + out["charges"].square().mean()


def capture(potential: nn.Module, num_stages: int = 2, **more: Any) -> Capture:
    module = LossOfCharges(potential)
    placement = [list(range(num_stages))]
    return capture_module(module, module.training_step, make_batch(TRACED), make_batch(OTHER), placement, **more)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_parity(num_stages: int) -> None:
    module = LossOfCharges(SelfDividing())
    found = capture(module.potential, num_stages)
    staged = pickle.loads(pickle.dumps(found.potential))
    assert staged.num_stages == num_stages and sum(staged.num_operations) == 5
    for sizes in (OTHER, (4,), (1, 3, 2)):
        assert_parity(staged, module, make_batch(sizes))


def test_shared_parameters_are_on_all_stages_that_read_them() -> None:
    stages = capture(SelfDividing(), 5).potential.parameter_stages()
    assert stages["parts.0.table.weight"] == {0, 4}
    assert stages["parts.1.filters.0.weight"] == {1, 2, 3}
    assert stages["parts.2.mix.weight"] == {2}


def test_order_of_the_ways() -> None:
    assert isinstance(SelfDividing(), ExplicitStages) and not isinstance(Potential(), ExplicitStages)
    told = capture(SelfDividing()).describe()
    assert "cut at its own parts" in told and "tracing was refused (the forward reads a list of values" in told
    assert "refused" not in capture(SelfDividing(), stages="explicit").describe()
    assert "captured (traced in" in capture(Potential()).describe_capture()
    with pytest.raises(CaptureError, match="the forward reads a list of values"):
        capture(SelfDividing(), stages="captured")
    with pytest.raises(CaptureError, match=r"stages='explicit', but the potential 'potential' \(Potential\) declares"):
        capture(Potential(), stages="explicit")


def test_both_refused() -> None:
    with pytest.raises(CaptureError, match=r"(?s)reads a list of values.*own stages were refused too:.*has 3 parts"):
        capture(SelfDividing(num_layers=1), 4)


def changed(**methods: Any) -> nn.Module:
    return type("Changed", (SelfDividing,), methods)()


class Renamed(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: Features, features: Features) -> Features:
        return {"e": self.part(inputs, features)["energy"]}


class Growing(nn.Module):
    """Features whose size is that of no input."""

    def forward(self, inputs: Features, features: Features) -> Features:
        return {"h": features["h"], "seen": torch.zeros(inputs["edges"].shape[1] + 1)}


class JustFeatures(nn.Module):
    def forward(self, inputs: Features, features: Features) -> Tensor:
        return features["h"]


def with_part(position: int, part: Any) -> nn.Module:
    model = SelfDividing()
    parts = list(model.parts)
    parts[position] = part(model) if not isinstance(part, nn.Module) else part
    model.stage_parts = lambda: parts  # type: ignore[method-assign]
    model.forward = lambda batch: SelfDividing.forward(model, batch)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("potential", "words"),
    [
        (lambda: changed(stage_inputs=lambda self, batch: {"species": batch["species"]}), "without the coordinates"),
        (lambda: changed(stage_parts=lambda self: [torch.tanh]), "expected nn.Modules"),
        (lambda: with_part(1, JustFeatures()), r"part 1 \(JustFeatures\).*returned Tensor; expected a dict of tensors"),
        (lambda: with_part(4, lambda m: Renamed(m.parts[4])), "expected 'energy' among them"),
        (lambda: with_part(2, Growing()), "feature 'seen' of part 2.*no size of an input"),
        (lambda: with_part(1, SelfDividing().parts[1]), "part 1 .* parameters that the potential does not have"),
    ],
)
def test_mistakes(potential: Any, words: str) -> None:
    model = potential()
    # Its forward stays right, so that the mistake is in the declaration.
    model.forward = SelfDividing().forward
    with pytest.raises(CaptureError, match=words):
        capture(model, stages="explicit")


def test_parts_that_compute_something_else() -> None:
    """The forward is the truth; its own stages are validated like captured ones."""

    class Shifted(SelfDividing):
        def forward(self, batch: Batch) -> Any:
            out = super().forward(batch)
            return {**out, "forces": 1.001 * out["forces"]}

    with pytest.raises(CaptureError, match=r"differs from the module itself.*output 2"):
        capture(Shifted(), stages="explicit")


def test_parameters_in_the_outputs() -> None:
    class Scaled(SelfDividing):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def stage_outputs(self, inputs: Features, results: Features, gradients: Features) -> Any:
            out = super().stage_outputs(inputs, results, gradients)
            return {**out, "forces": self.scale * out["forces"]}

    with pytest.raises(CaptureError, match=r"stage_outputs .* reads the parameters scale"):
        capture(Scaled(), stages="explicit")


def test_sizes_are_checked_at_run_time() -> None:
    """A size that two examples could not tell from a constant is an error later, not a message of a wrong size."""

    class Bound(SelfDividing):
        def stage_inputs(self, batch: Batch) -> Features:
            return {**super().stage_inputs(batch), "mask": batch.get("mask", torch.ones(2))}

    staged = capture(Bound(), stages="explicit").potential
    model = Bound()
    batch = {**make_batch(OTHER), "mask": torch.ones(5)}
    tensors: list[Tensor] = staged.inputs(model)((batch,), {})
    with pytest.raises(CaptureError, match=r"input 'mask'.*\(5,\).*expected \(2,\)"):
        staged.bind_sizes(tensors)
