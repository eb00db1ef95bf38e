"""Steps that differentiate by themselves: what comes before stands for the potential."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_models import DTYPE, OTHER, TRACED, Batch, Potential, Step, Traced, assert_parity, make_batch
from torch import Tensor, nn
from torch.autograd import grad

from lightning_januspipe.capture.capture import capture_module
from lightning_januspipe.capture.find.find_potential import find_potential
from lightning_januspipe.capture.find.grad_call import ReplacedCalls
from lightning_januspipe.errors import CaptureError


class Energy(Potential):
    """Energies and charges of positions that the step has strained."""

    def forward(self, batch: Batch, positions: Tensor) -> Any:
        vectors = positions[batch["edges"][1]] - positions[batch["edges"][0]]
        h = self.features(batch, vectors)
        return {"energy": self.pool(self.readout(h)[:, 0], batch), "charges": self.charge(h)[:, 0], "h": h}


class PlainStep(nn.Module):
    """Strains positions, asks a submodule for energies, shifts them by its own parameter, and differentiates."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.model = Energy(num_layers, width=12)
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, 3, dtype=DTYPE))
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=DTYPE))
        self.criterion = Weighted()

    def log(self, name: str, value: Any) -> None: ...

    def energies(self, batch: Batch, positions: Tensor) -> Any:
        out = self.model(batch, positions)
        shifts = out["energy"].new_zeros(out["energy"].shape).index_add(0, batch["index"], self.shift[batch["species"]])
        return self.scale * out["energy"] + shifts, out["charges"]

    def training_step(self, batch: Batch) -> Any:
        positions = batch["positions"].detach().requires_grad_()
        strain = torch.zeros_like(batch["cell"]).requires_grad_()
        strained = positions + torch.einsum("ni,nij->nj", positions, (strain + strain.mT)[batch["index"]] / 2)
        energy, charges = self.energies(batch, strained)
        gradient, virial = torch.autograd.grad(energy.sum(), [positions, strain], create_graph=True)
        loss = self.criterion((energy - batch["energy"]) ** 2, (gradient + batch["forces"]) ** 2, virial**2)
        return {"loss": loss + charges.square().mean()}


class Weighted(nn.Module):
    """A loss with a parameter of its own, used by the step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.1], dtype=DTYPE))

    def forward(self, *terms: Tensor) -> Tensor:
        return torch.stack([t.mean() for t in terms]) @ self.weight


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_parity(num_stages: int) -> None:
    module = PlainStep()
    traced = Traced(module)
    assert traced.call.replaced == ReplacedCalls(("model",), (2,))
    assert set(traced.call.step_parameters) == {"shift", "scale"}
    captured = traced.cut(num_stages)
    for sizes in (OTHER, TRACED, (1, 4)):
        assert_parity(captured, module, make_batch(sizes))


def test_parameters_that_the_step_reads_are_on_all_stages() -> None:
    stages = Traced(PlainStep()).cut(3).parameter_stages()
    assert stages["scale"] == stages["shift"] == {0, 1, 2}
    assert stages["model.embedding.weight"] != {0, 1, 2}
    assert not stages.get("criterion.weight"), "it is outside the stages: the step alone reads it"


def test_features_that_the_step_does_not_read_are_not_computed() -> None:
    traced = Traced(PlainStep())
    shapes = [traced.program.by_name[traced.program.outputs[i]].spec for i in traced.regions.outputs]
    assert len(shapes) == 4, "two derivatives, energies and charges, but not h"


def test_several_submodules() -> None:
    class Chain(Step):
        """Encoder and head are called by the step, one after the other."""

        def __init__(self) -> None:
            super().__init__(Encoder(2, width=12))
            self.head = Head()

        def training_step(self, batch: Batch) -> Any:
            positions = batch["positions"].detach().requires_grad_()
            energy = self.head(self.potential(batch, positions), batch)
            forces = -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]
            return (energy - batch["energy"]).square().mean() + (forces - batch["forces"]).square().mean()

    class Encoder(Potential):
        def forward(self, batch: Batch, positions: Tensor) -> Tensor:
            return self.features(batch, positions[batch["edges"][1]] - positions[batch["edges"][0]])

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 1, dtype=DTYPE)

        def forward(self, h: Tensor, batch: Batch) -> Tensor:
            return h.new_zeros(batch["cell"].shape[0]).index_add(0, batch["index"], self.linear(h)[:, 0])

    module = Chain()
    traced = Traced(module)
    assert traced.call.replaced == ReplacedCalls(("potential", "head"), (1,))
    assert len(traced.regions.outputs) == 2, "the derivative and the energy; features go no further than the head"
    assert_parity(traced.cut(2), module, make_batch(OTHER))


def test_forward_of_the_lightning_module_itself() -> None:
    """``self(batch)``, whose forward differentiates; and ``self(batch)`` that returns energies."""

    class Whole(Potential):
        def log(self, name: str, value: Any) -> None: ...

        def training_step(self, batch: Batch) -> Any:
            out = self(batch)
            return (out["energy"] - batch["energy"]).square().mean() + (out["forces"] - batch["forces"]).square().mean()

    class WholeEnergy(Energy):
        def log(self, name: str, value: Any) -> None: ...

        def training_step(self, batch: Batch) -> Any:
            positions = batch["positions"].detach().requires_grad_()
            energy = self(batch, positions)["energy"]
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
            return (energy - batch["energy"]).square().mean() + (gradient + batch["forces"]).square().mean()

    for module, replaced in ((Whole(2), None), (WholeEnergy(2), ReplacedCalls(("",), (1,)))):
        traced = Traced(module)
        assert (traced.call.path, traced.call.replaced) == ("", replaced)
        assert_parity(traced.cut(2), module, make_batch(OTHER))


def find(module: Any) -> Any:
    return find_potential(module, module.training_step, make_batch(TRACED))


def test_energy_of_no_submodule() -> None:
    class Functional(PlainStep):
        def training_step(self, batch: Batch) -> Any:
            positions = batch["positions"].requires_grad_()
            energy = (positions.square().sum(-1) * self.shift[batch["species"]]).sum()
            return torch.autograd.grad(energy, positions, create_graph=True)[0].square().mean()

    with pytest.raises(CaptureError, match=r"Functional calls torch\.autograd\.grad on an energy that no submodule"):
        find(Functional())


def test_submodule_called_twice() -> None:
    class Twice(PlainStep):
        def energies(self, batch: Batch, positions: Tensor) -> Any:
            first, charges = super().energies(batch, positions)
            return first + super().energies(batch, positions)[0], charges

    with pytest.raises(CaptureError, match="'model' twice for what"):
        find(Twice())


def test_other_coordinates_in_evaluation() -> None:
    """An evaluation step that differentiates something else is refused, not given the wrong derivative."""

    class Different(PlainStep):
        def validation_step(self, batch: Batch) -> Any:
            positions = batch["positions"].detach().requires_grad_()
            energy, _ = self.energies(batch, positions)
            return torch.autograd.grad(energy.sum(), positions)[0]

    from capture_models import staged_gradients

    module = Different()
    captured = Traced(module).cut(2)
    with pytest.raises(CaptureError, match=r"shapes \[\(7, 3\)\].*captured with \[\(7, 3\), \(2, 3, 3\)\]"):
        staged_gradients(captured, module, make_batch(OTHER), module.validation_step)


def test_capture_leaves_the_module_as_it_was() -> None:
    module = PlainStep()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    capture = capture_module(module, module.training_step, make_batch(TRACED), make_batch(OTHER), [[0, 1]])
    assert capture.potential.replaced == ReplacedCalls(("model",), (2,))
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert list(module._modules) == ["model", "criterion"] and module.training
    assert not module.model._forward_hooks and "forward" not in vars(module.model)


class Terms(PlainStep):
    """Adds the forces of three terms: offsets, which have none, and two energies of the same positions.

    Args:
        differentiates: whether the second energy is differentiated by a submodule, not by the step itself.
    """

    def __init__(self, differentiates: bool) -> None:
        super().__init__(2)
        self.second = Forces(2, width=12) if differentiates else Energy(2, width=12)

    def training_step(self, batch: Batch) -> Any:
        positions = batch["positions"].detach().requires_grad_()
        offsets = self.shift[batch["species"]]
        no_forces = grad(offsets.sum(), positions, create_graph=True, allow_unused=True)[0]
        assert no_forces is None or not no_forces.any()
        first = self.model(batch, positions)
        forces = -grad(first["energy"].sum(), positions, create_graph=True)[0]
        second = self.second(batch, positions)
        if "forces" not in second:
            second["forces"] = -grad(second["energy"].sum(), positions, create_graph=True)[0]
        errors = (first["energy"] + second["energy"] - batch["energy"], forces + second["forces"] - batch["forces"])
        return sum(e.square().mean() for e in errors) + (first["charges"] + offsets).square().mean()


class Forces(Energy):
    """Energies and forces."""

    def forward(self, batch: Batch, positions: Tensor) -> Any:
        out = super().forward(batch, positions)
        return {**out, "forces": -grad(out["energy"].sum(), positions, create_graph=True)[0]}


@pytest.mark.parametrize(("differentiates", "num_inputs"), [(False, (1, 1, 1)), (True, (1, 1))])
def test_sum_of_derivatives(differentiates: bool, num_inputs: tuple[int, ...]) -> None:
    module = Terms(differentiates)
    traced = Traced(module)
    assert traced.call.replaced == ReplacedCalls(("model", "second"), num_inputs)
    assert len(traced.program.energies) == len(traced.program.coordinates) == 2
    for num_stages in (1, 2):
        for sizes in (OTHER, (1, 4)):
            assert_parity(traced.cut(num_stages), module, make_batch(sizes))
