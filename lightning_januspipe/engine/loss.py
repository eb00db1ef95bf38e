"""Differentiates the loss of a user's step: its gradients are the seeds of the stages' backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.engine.autocast import OFF, autocast_as, forget_casts
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.errors import CaptureError


class LossLeaves:
    """Holds leaves from which a loss is computed instead of energies and forces; their gradients seed BF and BE.

    Args:
        observables: Values of the potential that the loss reads.
        derivatives: Complete ∂E/∂x.

    Attributes:
        observables: A leaf for each observable.
        derivatives: A leaf for each derivative.
        inputs: The leaves that can be differentiated.
    """

    def __init__(self, observables: Sequence[Tensor], derivatives: Sequence[Tensor]) -> None:
        self.observables = [y.detach().requires_grad_(y.is_floating_point()) for y in observables]
        self.derivatives = [x.detach().requires_grad_() for x in derivatives]
        self.inputs = [v for v in (*self.observables, *self.derivatives) if v.requires_grad]

    def seeds(self, gradients: Sequence[Tensor | None]) -> LossGradients:
        """Returns the seeds, with zeros for derivatives that the loss does not read.

        Args:
            gradients: Of the loss with respect to :attr:`inputs`, None where it does not depend on one.
        """
        given = iter(gradients)
        observables = [next(given) if y.requires_grad else None for y in self.observables]
        return LossGradients(
            observables, [torch.zeros_like(x) if g is None else g for g, x in zip(given, self.derivatives, strict=True)]
        )


def loss_in(output: Any, name: str) -> Tensor:
    """Returns the loss in what a training step returned.

    Args:
        output: What the step returned.
        name: Class of the LightningModule, for the message.

    Raises:
        CaptureError: There is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise CaptureError(
            f"training_step of {name} returned {type(output).__name__}; expected a loss (a tensor with one number), or "
            "a dict with the key 'loss'. Skipping a step by returning None is not possible in a pipeline."
        )
    return loss


def gradients_of_loss(loss: Tensor, weight: float, inputs: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients of a weighted loss, as a Trainer's backward pass computes them: outside autocast.

    Args:
        loss: The loss of one micro-batch.
        weight: Its factor. A loss in half precision is weighted in float32, where the factor of a gradient scaler fits.
        inputs: What to differentiate with respect to; None is returned where the loss does not depend on an input.
    """
    with autocast_as(OFF):
        weighted = (loss.float() if loss.dtype == torch.float16 else loss) * weight
        found = torch.autograd.grad(weighted, inputs, allow_unused=True)
    forget_casts()
    return list(found)


def require_finite(loss: Tensor, index: int) -> None:
    """Refuses a loss that is NaN or infinite: every parameter would be lost with the next optimizer step.

    Args:
        loss: The loss of one micro-batch.
        index: Index of its micro-batch.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    if not bool(torch.isfinite(loss.detach()).all()):
        raise FloatingPointError(
            f"the loss of micro-batch {index} is {loss.detach().item()}. Look at the batch's labels and structures "
            "(overlapping atoms, missing labels), or lower the learning rate."
        )
