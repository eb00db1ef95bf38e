"""Computes the loss that validation differentiates: it reads every number of some outputs, whatever their units."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.errors import CaptureError


def probe_loss(outputs: Sequence[Tensor]) -> Tensor:
    """Returns a loss that is quadratic in every floating-point output that carries a gradient, so no term is constant.

    Raises:
        CaptureError: no output carries a gradient.
    """
    trainable = [x for x in outputs if x.is_floating_point() and x.requires_grad and x.numel()]
    # A structure without a cell has a stress of NaN or infinity, which its loss leaves out.
    finite = [x for x in trainable if bool(x.detach().isfinite().all())]
    terms = [
        ((x / x.detach().abs().max().clamp_min(1e-3) - probe_targets(x)) ** 2).mean() for x in (finite or trainable)
    ]
    if not terms:
        raise CaptureError(
            "no output of the potential depends on its parameters in a differentiable way. A detach() or "
            "torch.no_grad() on the way from the energy to the forces cuts the gradient; remove it in training."
        )
    return functools.reduce(operator.add, terms)


def probe_seeds(leaves: LossLeaves) -> LossGradients:
    """Returns the gradients of the loss of energies and forces themselves, with which BF and BE start.

    Raises:
        CaptureError: no value carries a gradient.
    """
    with torch.enable_grad():
        loss = probe_loss([*leaves.observables, *leaves.derivatives])
        return leaves.seeds(torch.autograd.grad(loss, leaves.inputs, allow_unused=True))


def probe_targets(tensor: Tensor) -> Tensor:
    """Returns a fixed number between 0.3 and 1.1 for each entry of a tensor; neighbouring entries differ."""
    flat = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return (0.3 + 0.8 * torch.frac(flat * 0.6180339887)).reshape(tensor.shape).to(tensor.dtype)
