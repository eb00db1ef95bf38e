"""Computes losses and metrics against labels that may be missing (NaN)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override


def masked_loss(prediction: Tensor, label: Tensor, huber_delta: float | None = None) -> Tensor:
    """Return the mean squared or Huber error over the labels that are not NaN; zero if all are.

    No control flow and no shape depends on the labels.

    Args:
        prediction: (...) predictions.
        label: (...) labels of the same shape.
        huber_delta: Error at which the Huber loss turns linear, in the unit of the labels; None for the squared error.

    Returns:
        Scalar loss.
    """
    known = ~torch.isnan(label)
    target = torch.where(known, label, prediction.detach())
    if huber_delta is None:
        losses = F.mse_loss(prediction, target, reduction="none")
    else:
        losses = F.huber_loss(prediction, target, reduction="none", delta=huber_delta)
    return losses.sum() / known.sum().clamp(min=1)


class MaskedError(Metric):
    """Computes the mean absolute or root mean squared error over the labels that are not NaN; NaN if all are.

    Args:
        squared: Compute the root mean squared error instead of the mean absolute error.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example:
        >>> error = MaskedError()
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.5, float("nan")]))
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, squared: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squared = squared
        self.total: Tensor
        self.count: Tensor
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add (...) predictions and labels."""
        known = ~torch.isnan(label)
        error = torch.where(known, prediction - label, 0.0)
        self.total = self.total + (error.square() if self.squared else error.abs()).sum()
        self.count = self.count + known.sum()

    @override
    def compute(self) -> Tensor:
        """Return the error over all predictions and labels that were added."""
        mean = self.total / self.count
        return mean.sqrt() if self.squared else mean
