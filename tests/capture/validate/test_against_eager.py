"""A captured potential that is not the user's module is refused before it trains."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from capture_models import OTHER, Batch, Potential, Step, Traced, make_batch
from torch import Tensor

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.program import Node, Ref, replace_refs
from lightning_januspipe.capture.validate.against_eager import run_eager, run_staged, validate_stages
from lightning_januspipe.errors import CaptureError


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Potential(3)))


def check(traced: Traced, captured: CapturedPotential) -> Any:
    return validate_stages(captured, traced.potential, traced.call_on(make_batch(OTHER)))


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_right_potential_passes(traced: Traced, num_stages: int) -> None:
    seconds = check(traced, traced.cut(num_stages))
    assert len(seconds) == num_stages
    assert all(min(s.fe, s.ff, s.bf, s.be) > 0 for s in seconds)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_eager_and_captured_agree_closely(traced: Traced, num_stages: int) -> None:
    captured, call = traced.cut(num_stages), traced.call_on(make_batch(OTHER))
    eager = run_eager(traced.potential, call, captured)
    found, _ = run_staged(captured, traced.potential, call)
    assert len(eager.derivatives) == 2 and len(eager.outputs) == 4
    for a, b in zip([*eager.derivatives, *eager.outputs], [*found.derivatives, *found.outputs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    scale = max(float(g.abs().max()) for g in eager.gradients.values())
    for name, parameter in traced.potential.named_parameters():
        a, b = (g.get(parameter, torch.zeros_like(parameter)) for g in (eager.gradients, found.gradients))
        assert float((a - b).abs().max()) <= 1e-10 * scale, name


def changed(traced: Traced, change: Any) -> CapturedPotential:
    captured = copy.deepcopy(traced.cut(2))
    change(captured.program)
    captured.program.by_name.update({n.name: n for n in captured.program.nodes})
    return captured


def first(program: Any, target: str) -> Node:
    return next(n for n in program.nodes if n.target == target)


def other_activation(program: Any) -> None:
    first(program, "aten.silu.default").target = "aten.tanh.default"


def other_sign(program: Any) -> None:
    program.outputs[1] = program.by_name[program.outputs[1]].args[0].name


def shifted_energy(program: Any) -> None:
    program.outputs[0] = program.outputs[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_activation, "∂E/∂x has largest difference"),
        (other_sign, "output 1 has largest difference"),
        (shifted_energy, r"output 0 has shape \(7,\) instead of \(2,\)"),
    ],
)
def test_wrong_values(traced: Traced, change: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        check(traced, changed(traced, change))


def test_right_values_with_wrong_gradients(traced: Traced) -> None:
    """A detached parameter changes no energy and no force."""

    def detach_weight(program: Any) -> None:
        weight = next(n for n, owned in program.parameters.items() if owned == "readout.weight")
        node = next(n for n in program.nodes if weight in n.inputs())
        node.args = replace_refs(node.args, lambda n: Ref("cut_off" if n == weight else n))
        spec = program.by_name[weight].spec
        program.nodes.insert(
            program.nodes.index(node), Node("cut_off", "call_function", "aten.detach.default", (Ref(weight),), {}, spec)
        )

    captured = changed(traced, detach_weight)
    owner = next(names for names in captured.cut.bodies if any("cut_off" in traced_inputs(captured, n) for n in names))
    owner.insert(0, "cut_off")
    with pytest.raises(CaptureError, match=r"parameter gradient of a force loss for 'readout\.weight' has largest"):
        check(traced, captured)


def traced_inputs(captured: CapturedPotential, name: str) -> list[str]:
    return captured.program.by_name[name].inputs()


class Detached(Potential):
    """Energies keep their gradient, forces lose it."""

    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Any:
        return [g.detach() for g in super().differentiate(energy, inputs)]


class Trap(Potential):
    """The parameters see detached positions: all forces come from a fixed trap."""

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        energy, extra = super().energy(batch, positions.detach(), strain.detach())
        trap = positions.square().sum(-1) + strain[batch["index"]].square().sum((-1, -2))
        return energy + self.pool(trap, batch), extra


class NoGradFeatures(Trap):
    """The same, with torch.no_grad() on the way."""

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        energy, extra = super().energy(batch, positions, strain)
        with torch.no_grad():
            correction = super().energy(batch, positions, strain)[0]
        return energy + correction, extra


class ZeroForces(Potential):
    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        energy, extra = super().energy(batch, positions.detach(), strain.detach())
        return energy + 0 * positions.sum() + 0 * strain.sum(), extra


@pytest.mark.parametrize(
    ("potential", "words"),
    [
        (Trap, r"not twice differentiable: a loss of its forces has zero or missing.*detach\(\), a torch\.no_grad\(\)"),
        (NoGradFeatures, "not twice differentiable"),
        (ZeroForces, "not twice differentiable"),
        (Detached, r"returns detached derivatives in training.*Remove the detach\(\)"),
    ],
)
def test_force_loss_that_would_train_nothing(potential: type[Potential], words: str) -> None:
    traced = Traced(Step(potential(1)))
    with pytest.raises(CaptureError, match=words):
        check(traced, traced.cut(1))


def test_no_trainable_parameters() -> None:
    traced = Traced(Step(Potential(1).requires_grad_(False)))
    with pytest.raises(CaptureError, match="no trainable parameters"):
        check(traced, traced.cut(1))


def test_evaluation_needs_no_second_derivative() -> None:
    """Outside fit the potential keeps no graph of its forces, and may return detached energies."""

    class Evaluated(Potential):
        def forward(self, batch: Batch) -> Any:
            return {k: v if self.training else v.detach() for k, v in super().forward(batch).items()}

    module = Step(Evaluated(2)).eval()
    traced = Traced(module)
    captured = traced.cut(2)
    assert len(check(traced, captured)) == 2
    with pytest.raises(CaptureError, match="∂E/∂x has largest difference"):
        check(traced, changed(traced, other_activation))


@pytest.mark.parametrize("change", [None, other_activation])
def test_stress_without_a_cell_is_no_number(change: Any) -> None:
    """What is NaN or infinite in the module may be so in the captured potential, and all else is compared."""

    class EnergyForceStep(Step):
        def training_step(self, batch: Batch) -> Any:
            out = self.potential(batch)
            return (out["energy"] - batch["energy"]).square().mean() + (out["forces"] - batch["forces"]).square().mean()

    traced = Traced(EnergyForceStep(Potential(2)))
    batch = make_batch(OTHER)
    batch["cell"] = batch["cell"].clone()
    batch["cell"][0] = 0
    eager = run_eager(traced.potential, traced.call_on(batch), traced.cut(2))
    assert not eager.outputs[2][0].isfinite().any() and all(g.isfinite().all() for g in eager.gradients.values())
    captured = traced.cut(2) if change is None else changed(traced, change)
    with nullcontext() if change is None else pytest.raises(CaptureError, match="∂E/∂x has largest difference"):
        validate_stages(captured, traced.potential, traced.call_on(batch))


def test_numbers_that_only_the_captured_potential_lacks(traced: Traced) -> None:
    def without_stress(program: Any) -> None:
        node = next(n for n in program.nodes if n.name == program.outputs[2])
        node.args = (node.args[0], 0.0)

    with pytest.raises(CaptureError, match="output 2 has largest difference"):
        check(traced, changed(traced, without_stress))


def test_forces_that_vanish_by_symmetry() -> None:
    """Two equal atoms apart from each other alone have no forces on a lattice of their own; that is no mistake."""
    module = Step(Potential(2))
    traced = Traced(module)
    captured = traced.cut(2)
    alone = make_batch((1, 1))
    validate_stages(captured, traced.potential, traced.call_on(alone))


class Narrow(Potential):
    """Layers in float32 between positions and energies in float64, as models with a ``model_dtype`` have them."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        radial = torch.exp(-((vectors.square().sum(-1, keepdim=True).sqrt() / 4.0 - torch.arange(4)) ** 2))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"])
        return h.double()


def test_layers_in_a_coarser_type_than_positions() -> None:
    module = Step(Narrow(2))
    module.potential.layers.float()
    module.potential.embedding.float()
    traced = Traced(module, make_batch((5, 4)))
    captured = traced.cut(2)
    assert captured.dtypes == {torch.float32, torch.float64}
    assert {spec.dtype for spec in captured.chain.coordinates} == {torch.float64}
    check(traced, captured)
    with pytest.raises(CaptureError, match="differs from the module itself"):
        check(traced, changed(traced, other_activation))


@pytest.mark.parametrize("how", ["detach", "data"])
def test_energy_that_does_not_depend_on_positions(how: str) -> None:
    class Cut(Potential):
        def features(self, batch: Batch, vectors: Tensor) -> Tensor:
            return super().features(batch, vectors.detach() if how == "detach" else vectors.data)

    with pytest.raises(CaptureError, match=r"does not depend in a differentiable way.*Look for a detach\(\)"):
        Traced(Step(Cut(2)))
