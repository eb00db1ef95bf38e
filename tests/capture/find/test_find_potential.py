"""Which submodule is the potential, and clear words where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_models import OTHER, TRACED, Potential, Step, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture.find.find_potential import find_potential
from lightning_januspipe.capture.find.grad_call import PotentialCall, ReplacedCalls, call_arguments
from lightning_januspipe.errors import CaptureError


def find(module: nn.Module, potential: str | None = None) -> PotentialCall:
    return find_potential(module, module.training_step, make_batch(TRACED), potential)


class AttributeGrad(Potential):
    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs=energy.sum(), inputs=inputs, create_graph=True)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Any:
        return self.inner(batch)


@pytest.mark.parametrize("potential", [Potential, AttributeGrad])
def test_found_however_grad_was_imported(potential: type[Potential]) -> None:
    found = find(Step(potential(1)))
    assert found.path == "potential"
    assert list(found.args[0]) == list(make_batch(TRACED))
    assert found.kwargs == {}


def test_outermost_submodule_unless_another_is_named() -> None:
    module = Step(Wrapper(Wrapper(Potential(1))))
    assert find(module).path == "potential"
    assert find(module, "potential.inner").path == "potential.inner"
    assert find(module, "potential.inner.inner").path == "potential.inner.inner"


def test_call_is_that_of_the_step() -> None:
    class Keywords(Potential):
        def forward(self, batch: Any, *, factor: float = 1.0) -> Any:
            return super().forward(batch)

    class Scaled(Step):
        def training_step(self, batch: Any) -> Any:
            batch["positions"] = batch["positions"] * 2
            return self.potential(batch, factor=3.0)["energy"].sum()

    module = Scaled(Keywords(1))
    found = find(module)
    assert found.kwargs == {"factor": 3.0}
    assert torch.equal(found.args[0]["positions"], 2 * make_batch(TRACED)["positions"])
    args, kwargs = call_arguments(module, "potential", module.training_step, make_batch(OTHER))
    assert torch.equal(args[0]["positions"], 2 * make_batch(OTHER)["positions"])
    assert kwargs == {"factor": 3.0}


def test_outputs_that_the_step_reads() -> None:
    class EnergyAndCharges(Step):
        def training_step(self, batch: Any) -> Any:
            out = self.potential(batch)
            return out["charges"].square().sum() + torch.sum(out["energy"])

    assert find(Step(Potential(1))).read_outputs == (0, 1, 2)  # energy, forces, stress
    assert find(EnergyAndCharges(Potential(1))).read_outputs == (0, 3)


def test_hooks_and_grad_are_restored() -> None:
    module = Step(Potential(1))
    before = torch.nn.modules.module._global_forward_hooks.copy()
    find(module)
    with pytest.raises(CaptureError):
        find(Step(nn.Linear(1, 1)), "nowhere")
    assert torch.nn.modules.module._global_forward_hooks == before
    assert not module.potential._forward_pre_hooks


class Direct(nn.Module):
    """Predicts forces without differentiating."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, batch: Any) -> Any:
        return self.linear(batch["positions"])


class DirectStep(Step):
    def training_step(self, batch: Any) -> Any:
        return (self.potential(batch) - batch["forces"]).square().mean()


def test_no_grad_call() -> None:
    with pytest.raises(CaptureError, match=r"DirectStep never called torch\.autograd\.grad.*create_graph=True"):
        find(DirectStep(Direct()))


class TwoGrads(Potential):
    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Any:
        return [torch.autograd.grad(energy.sum(), x, create_graph=True)[0] for x in inputs]


def test_two_grad_calls_in_one_forward_may_be_of_one_energy() -> None:
    assert find(Step(TwoGrads(1))).path == "potential"


def test_potential_called_twice() -> None:
    class Twice(Step):
        def training_step(self, batch: Any) -> Any:
            return self.potential(batch)["energy"].sum() + self.potential(batch)["forces"].square().sum()

    with pytest.raises(CaptureError, match="calls 'potential' twice for what it differentiates"):
        find(Twice(Potential(1)))


def test_two_potentials() -> None:
    class Ensemble(Step):
        def __init__(self) -> None:
            super().__init__(Potential(1))
            self.second = Potential(1)

        def training_step(self, batch: Any) -> Any:
            return self.potential(batch)["energy"].sum() + self.second(batch)["energy"].sum()

    call = find(Ensemble())
    assert call.path == "" and call.replaced == ReplacedCalls(("potential", "second"), ())


class GradInStep(Step):
    """The submodule gives the energy only."""

    def training_step(self, batch: Any) -> Any:
        positions = batch["positions"].requires_grad_()
        energy = self.potential(positions).sum()
        forces = -torch.autograd.grad(energy, positions, create_graph=True)[0]
        return (forces - batch["forces"]).square().mean()


def test_grad_in_the_step_itself() -> None:
    found = find(GradInStep(nn.Linear(3, 1, dtype=torch.float64)))
    assert (found.path, found.replaced, found.step_parameters) == ("", ReplacedCalls(("potential",), (1,)), ())
    assert set(found.args[0]) == set(make_batch(TRACED)), "its argument is the batch"
    assert found.read_outputs == (0, 1)  # the derivative, and the energy that is summed


class FirstOrder(Potential):
    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Any:
        return torch.autograd.grad(energy.sum(), inputs, retain_graph=True)


def test_without_create_graph() -> None:
    module = Step(FirstOrder(1))
    with pytest.raises(CaptureError, match="'potential' is not twice differentiable.*create_graph=True"):
        find(module)
    assert find(module.eval()).path == "potential"  # evaluation needs forces only


def test_named_potential_is_not_a_submodule() -> None:
    with pytest.raises(CaptureError, match=r"potential='modle' is not a submodule of Step.*\['potential'\]"):
        find(Step(Potential(1)), "modle")


def test_named_potential_differentiates_nothing() -> None:
    with pytest.raises(CaptureError, match=r"potential='potential\.readout' was named.*Pass potential='potential'"):
        find(Step(Potential(1)), "potential.readout")


@pytest.mark.parametrize("functional", [False, True])
def test_parameters_of_the_potential_used_outside(functional: bool) -> None:
    class Regularized(Step):
        def training_step(self, batch: Any) -> Any:
            weight = self.potential.readout.weight
            penalty = nn.functional.mse_loss(weight, torch.zeros_like(weight)) if functional else weight.square().sum()
            return super().training_step(batch) + penalty

    with pytest.raises(CaptureError, match=r"outside the .* forward \(potential\.readout\.weight\).*weight_decay"):
        find(Regularized(Potential(1)))


def test_device_and_shape_of_parameters_may_be_asked_for() -> None:
    class Moves(Step):
        def training_step(self, batch: Any) -> Any:
            weight = next(self.potential.parameters())
            assert weight.numel() == weight.shape.numel() and weight.grad is None and weight.requires_grad
            return super().training_step({k: v.to(weight.device) for k, v in batch.items()})

    assert find(Moves(Potential(1))).path == "potential"


def test_step_without_the_potential() -> None:
    with pytest.raises(CaptureError, match="did not call its potential 'potential' for this batch"):
        call_arguments(Step(Potential(1)), "potential", lambda batch: None, make_batch(OTHER))
