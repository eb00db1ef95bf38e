"""The loss of a user's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.engine.autocast import OFF, autocast_as, forget_casts
from lightning_januspipe.errors import CaptureError


def loss_in(output: Any, name: str) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        CaptureError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise CaptureError(
            f"training_step of {name} returned {type(output).__name__}; expected a loss (a tensor with one number), or "
            "a dict with the key 'loss'. Skipping a step by returning None is not possible in a pipeline."
        )
    return loss


def gradients_of_loss(loss: Tensor, weight: float, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a weighted loss, as a Trainer's backward pass has them: outside autocast.

    Args:
        loss: of one micro-batch.
        weight: its factor. A loss in half precision is weighted in float32, where the factor of a gradient scaler fits.
        inputs: what to differentiate with respect to; None is returned for those that the loss does not depend on.
    """
    with autocast_as(OFF):
        weighted = (loss.float() if loss.dtype == torch.float16 else loss) * weight
        found = torch.autograd.grad(weighted, inputs, allow_unused=True)
    forget_casts()
    return list(found)


def require_finite(loss: Tensor, index: int) -> None:
    """Refuse a loss that is NaN or infinite: every parameter would be lost with the next optimizer step.

    Raises:
        FloatingPointError: it is.
    """
    if not bool(torch.isfinite(loss.detach()).all()):
        raise FloatingPointError(
            f"the loss of micro-batch {index} is {loss.detach().item()}. Look at the batch's labels and structures "
            "(overlapping atoms, missing labels), or lower the learning rate."
        )
