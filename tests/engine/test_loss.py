"""The loss of a step and its seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_januspipe.engine.loss import LossLeaves, gradients_of_loss, loss_in, require_finite
from lightning_januspipe.errors import CaptureError


def test_seeds_are_the_gradients_of_the_loss() -> None:
    energy, species, unread = torch.tensor([1.0, 2.0]), torch.tensor([3, 4]), torch.tensor([5.0])
    forces, virial = torch.tensor([0.5, -1.5]), torch.zeros(3)
    leaves = LossLeaves([energy, species, unread], [forces, virial])
    assert [v.requires_grad for v in leaves.observables] == [True, False, True]
    assert all(leaf.is_leaf and leaf.grad_fn is None for leaf in leaves.inputs)
    loss = (leaves.observables[0] ** 2).sum() + (leaves.derivatives[0] ** 3).sum()
    seeds = leaves.seeds(gradients_of_loss(loss, 0.5, leaves.inputs))
    assert torch.equal(seeds.observables[0], energy)  # type: ignore[arg-type]
    assert seeds.observables[1:] == [None, None]
    torch.testing.assert_close(seeds.derivatives[0], 1.5 * forces**2)
    assert torch.equal(seeds.derivatives[1], virial), "zeros where the loss does not read a derivative"


def test_gradients_are_taken_outside_autocast() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = (weight @ weight).square().sum()
        (found,) = gradients_of_loss(loss, 2.0, [weight])
    (expected,) = torch.autograd.grad(2 * (weight @ weight).square().sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("output", [None, torch.ones(2), {"losses": torch.ones(())}, {"loss": 1.0}, 3.0])
def test_what_is_no_loss_is_refused(output: Any) -> None:
    with pytest.raises(CaptureError, match="training_step of Mine returned .*; expected a loss"):
        loss_in(output, "Mine")


def test_losses_are_found() -> None:
    loss = torch.ones(())
    assert loss_in(loss, "Mine") is loss_in({"loss": loss, "other": 1}, "Mine") is loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    require_finite(torch.ones(()), 3)
    with pytest.raises(FloatingPointError, match=rf"the loss of micro-batch 3 is {value}"):
        require_finite(torch.tensor(value), 3)
