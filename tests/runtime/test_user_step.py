"""The user's own step runs around the captured potential, twice, and sees nothing of it."""

from __future__ import annotations

import random
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import DTYPE, Batch, Potential, Step, Traced, eager_gradients, make_batch, staged_gradients
from torch import Tensor, nn

from lightning_januspipe.capture.patches import patched
from lightning_januspipe.capture.side_effects import silent_log
from lightning_januspipe.capture.stages.captured import CapturedPotential, CapturedStage
from lightning_januspipe.capture.trees import copied
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import StageOutput
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.runtime.user_step import CapturedStep


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Potential(2)))


def around(traced: Traced, kind: type[Step], **attributes: Any) -> tuple[CapturedPotential, Step]:
    """The traced potential in another module, which has another step."""
    module = kind(traced.potential)
    for name, value in attributes.items():
        setattr(module, name, value)
    return traced.cut(2), module


def results(traced: Traced, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Observables and derivatives from the whole program."""
    out: StageOutput = CapturedStage(traced.cut(1), 0, traced.potential)(tensors, [])
    return [y.detach() for y in out.observables], list(torch.autograd.grad(out.energies, out.coordinates))


def run(traced: Traced, captured: CapturedPotential, module: Step, batch: Batch, weight: float = 1.0) -> Any:
    """Prepare and loss of one micro-batch, with the gradients outside the stages."""
    outside = GradientBuffers()
    step = CapturedStep(captured, module, outside.add)
    given = step.prepare(3, module.training_step, batch)
    y, x = results(traced, given.tensors)
    return step.loss(3, weight, y, x), outside


class Noisy(Step):
    """Augments positions before the potential and draws again behind it."""

    def training_step(self, batch: Batch) -> Any:
        noise = 0.05 * torch.randn_like(batch["positions"])
        noise = noise * (random.random() + np.random.rand())
        batch["positions"] = batch["positions"] + noise
        batch["forces"] = batch["forces"] - noise
        return super().training_step(batch) * (1 + torch.rand(1, dtype=DTYPE))


def seed(value: int = 7) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def test_random_numbers_are_the_same_in_both_runs(traced: Traced) -> None:
    captured, module = around(traced, Noisy)
    batch = make_batch((3, 2))
    seed()
    seed(int(torch.randint(2**31, ())))  # a micro-batch draws from a seed that is drawn for it
    expected_loss, expected = eager_gradients(module, batch)
    seed()
    loss, found = staged_gradients(captured, module, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8 * float(gradient.abs().max()))
    different, _ = staged_gradients(captured, module, batch)
    assert abs(float(different - loss)) > 1e-6


def test_random_numbers_go_on_after_the_step(traced: Traced) -> None:
    """Micro-batches prepared later draw other numbers, whenever the losses of the earlier ones are computed."""
    captured, module = around(traced, Noisy)
    step = CapturedStep(captured, module, GradientBuffers().add)
    batch = make_batch((3, 2))
    seed()
    first = step.prepare(0, module.training_step, batch).tensors
    state = torch.get_rng_state(), random.getstate()
    step.loss(0, 1.0, *results(traced, first))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    second = step.prepare(1, module.training_step, batch).tensors
    place = captured.call.tensors.index("args[0]['positions']")
    assert not torch.allclose(first[place], second[place])


class Overwriting(Step):
    """Writes predictions over the labels."""

    def training_step(self, batch: Batch) -> Any:
        labels = dict(batch)
        batch.update(self.potential(batch))
        loss = (batch["forces"] - labels["forces"]).square().mean()
        del batch["cell"]
        return loss


def test_batch_of_the_caller_is_not_changed(traced: Traced) -> None:
    captured, module = around(traced, Overwriting)
    batch = make_batch((3, 2))
    before = dict(batch)
    (output, _), _ = run(traced, captured, module, batch)
    assert list(batch) == list(before)
    assert all(batch[k] is before[k] for k in before)
    torch.testing.assert_close(output, eager_gradients(module, batch)[0])


def test_shallow_copies() -> None:
    tensor = torch.zeros(1)
    batch = {"a": tensor}
    for made in (batch, [batch], (batch, [batch])):
        other = copied(made)
        assert type(other) is type(made) and other is not made
    inner = copied((batch, tensor))
    assert inner[0] is not batch and inner[0]["a"] is tensor and inner[1] is tensor
    pair = namedtuple("pair", "x y")(tensor, 2)
    assert copied(pair) == pair


class Logging(Step):
    def __init__(self, potential: nn.Module) -> None:
        super().__init__(potential)
        self.logged: list[str] = []

    def log(self, name: str, value: Any) -> None:
        self.logged.append(name)

    def training_step(self, batch: Batch) -> Any:
        self.log("before", 1.0)
        loss = super().training_step(batch)
        self.log("after", loss)
        return loss


def test_log_is_silent_in_prepare(traced: Traced) -> None:
    captured, module = around(traced, Logging)
    step = CapturedStep(captured, module, GradientBuffers().add)
    batch = make_batch((3, 2))
    given = step.prepare(0, module.training_step, batch)
    assert module.logged == []
    assert "log" not in module.__dict__
    step.loss(0, 1.0, *results(traced, given.tensors))
    assert module.logged == ["before", "after"]


def test_log_is_put_back() -> None:
    module, seen = Logging(nn.Identity()), []
    with patched(module, "log", lambda name, value: seen.append(name)):
        module.log("outer", 1)
        with pytest.raises(RuntimeError), silent_log(module):
            module.log("silent", 1)
            raise RuntimeError
        module.log("outer", 2)
    module.log("own", 3)
    assert seen == ["outer", "outer"] and module.logged == ["own"]


def test_weight_scales_gradients_and_not_the_output(traced: Traced) -> None:
    captured, module = around(traced, Step)
    batch = make_batch((3, 2))
    (whole, all_of), (quarter, part) = (run(traced, captured, module, batch, w)[0] for w in (1.0, 0.25))
    torch.testing.assert_close(whole, quarter)
    for a, b in zip(all_of.derivatives, part.derivatives, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(0.25 * a, b)


def test_potential_is_put_back(traced: Traced) -> None:
    captured, module = around(traced, Step)
    batch = make_batch((3, 2))
    expected = eager_gradients(module, batch)[0]
    run(traced, captured, module, batch)
    assert "forward" not in module.potential.__dict__ and not module.potential._forward_pre_hooks
    torch.testing.assert_close(eager_gradients(module, batch)[0], expected)


class Learned(Step):
    """Has a parameter outside the potential."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__(potential)
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=DTYPE))
        self.unused = nn.Parameter(torch.zeros(2, dtype=DTYPE))
        self.frozen = nn.Parameter(torch.zeros(2, dtype=DTYPE), requires_grad=False)

    def training_step(self, batch: Batch) -> Any:
        return {"loss": self.weight * super().training_step(batch), "more": 1}


def test_parameters_outside_the_potential(traced: Traced) -> None:
    captured, module = around(traced, Learned)
    batch = make_batch((3, 2))
    (output, _), outside = run(traced, captured, module, batch, 0.5)
    expected, gradients = eager_gradients(module, batch)
    torch.testing.assert_close(output["loss"], expected)
    assert output["more"] == 1
    found = outside.get(module.weight)
    assert found is not None
    torch.testing.assert_close(found, 0.5 * gradients["weight"])
    assert outside.get(module.unused) is None and outside.get(module.frozen) is None
    step = CapturedStep(captured, module, outside.add)
    assert {id(p) for p in step.outside_parameters} == {id(module.weight), id(module.unused)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(traced: Traced, value: float) -> None:
    captured, module = around(traced, Step)
    batch = make_batch((3, 2))
    batch["energy"][0] = value
    with pytest.raises(FloatingPointError, match=r"loss of micro-batch 3 is (nan|inf).*labels"):
        run(traced, captured, module, batch)


class OutsideOnly(Learned):
    def training_step(self, batch: Batch) -> Any:
        self.potential(batch)
        return self.weight.square()


class Constant(Step):
    def training_step(self, batch: Batch) -> Any:
        return self.potential(batch)["forces"].detach().sum()


@pytest.mark.parametrize("kind", [OutsideOnly, Constant])
def test_loss_that_reads_nothing(traced: Traced, kind: type[Step]) -> None:
    captured, module = around(traced, kind)
    with pytest.raises(CaptureError, match=rf"loss of {kind.__name__} depends on no energy and no derivative"):
        run(traced, captured, module, make_batch((3, 2)))


@pytest.mark.parametrize("returned", [None, {"energy": torch.zeros(1)}, torch.zeros(2), 1.5])
def test_step_that_returns_no_loss(traced: Traced, returned: Any) -> None:
    class NoLoss(Step):
        def training_step(self, batch: Batch) -> Any:
            self.potential(batch)
            return returned

    captured, module = around(traced, NoLoss)
    with pytest.raises(CaptureError, match="training_step of NoLoss returned .*expected a loss"):
        run(traced, captured, module, make_batch((3, 2)))


def test_energy_loss_alone(traced: Traced) -> None:
    """Derivatives that the loss does not read get zero cotangents."""

    class EnergyOnly(Step):
        def training_step(self, batch: Batch) -> Any:
            return self.potential(batch)["energy"].square().mean()

    captured, module = around(traced, EnergyOnly)
    (_, seeds), _ = run(traced, captured, module, make_batch((3, 2)))
    assert [float(d.abs().max()) for d in seeds.derivatives] == [0, 0]
    assert sum(s is not None for s in seeds.observables) == 1


def test_step_without_the_potential(traced: Traced) -> None:
    captured, module = around(traced, Step)
    step = CapturedStep(captured, module, GradientBuffers().add)
    with pytest.raises(CaptureError, match="did not call its potential"):
        step.prepare(0, lambda batch: torch.zeros(()), make_batch((3, 2)))


def test_prepare_gives_tensors_and_sizes(traced: Traced) -> None:
    captured, module = around(traced, Step)
    step = CapturedStep(captured, module, GradientBuffers().add)
    batch = make_batch((3, 2))
    given = step.prepare(0, module.training_step, batch)
    names = [place.split("'")[1] for place in captured.call.tensors]
    assert sorted(names) == sorted(batch)
    assert all(x is batch[name] for name, x in zip(names, given.tensors, strict=True))
    assert set(given.symbols.values()) == {5, 2, 3, 8}  # atoms, structures (or ends of edges), directions, edges


def test_evaluation(traced: Traced) -> None:
    captured, module = around(traced, Step)
    step = CapturedStep(captured, module, GradientBuffers().add)
    batch = make_batch((3, 2))
    given = step.prepare(0, module.potential, batch)
    found = step.finish(0, *results(traced, given.tensors))
    for name, value in module.potential(batch).items():
        torch.testing.assert_close(found[name], value)
    step.prepare(1, module.potential, batch)
    step.clear()
    with pytest.raises(KeyError):
        step.finish(1, *results(traced, given.tensors))
