"""Computes losses and metrics against labels that may be missing (NaN)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override


def masked_loss(
    prediction: Tensor, label: Tensor, huber_delta: float | None = None, weight: Tensor | None = None
) -> Tensor:
    """Returns the mean squared or Huber error over the labels that are not NaN; zero if all are.

    No control flow and no shape depends on the labels.

    Args:
        prediction: (...) predictions.
        label: (...) labels of the same shape.
        huber_delta: Error at which the Huber loss turns linear, in the unit of the labels; None for the squared error.
        weight: Factors of the errors along the first dimension; the sum is still divided by the number of labels.

    Returns:
        Scalar loss.
    """
    total, count = _summed_loss(prediction, label, huber_delta, weight)
    return total / count.clamp(min=1)


def _summed_loss(
    prediction: Tensor, label: Tensor, huber_delta: float | None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the losses of known labels, and how many labels are known."""
    known = ~torch.isnan(label)
    target = torch.where(known, label, prediction.detach())
    if huber_delta is None:
        losses = F.mse_loss(prediction, target, reduction="none")
    else:
        losses = F.huber_loss(prediction, target, reduction="none", delta=huber_delta)
    if weight is not None:
        losses = losses * weight.to(losses.dtype).reshape(-1, *[1] * (losses.dim() - 1))
    return losses.sum(), known.sum()


class _ExactSums(Metric):
    """Adds up float64 states, over batches and replicas, whatever the dtype of the module that it is part of."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def add_sum(self, name: str, size: tuple[int, ...] = ()) -> None:
        """Adds a state of zeros."""
        self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> "_ExactSums":
        super()._apply(fn, *args)
        for name, default in self._defaults.items():
            assert isinstance(default, Tensor)
            self._defaults[name] = default.double()
            setattr(self, name, getattr(self, name).double())
        return self


class MaskedLoss(_ExactSums):
    """Computes the weighted sum of :func:`masked_loss` of several quantities over a whole dataset.

    The mean of each quantity is taken over all its labels, so that the result does not depend on batches.

    Args:
        weights: Weight of each quantity.
        huber_delta: See :func:`masked_loss`.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example:
        >>> loss = MaskedLoss({"energy": 2.0})
        >>> loss({"energy": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, float("nan")]))})
        tensor(2., dtype=torch.float64)
    """

    def __init__(self, weights: Mapping[str, float], huber_delta: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = dict(weights)
        self.huber_delta = huber_delta
        self.totals: Tensor
        self.counts: Tensor
        self.add_sum("totals", (len(self.weights),))
        self.add_sum("counts", (len(self.weights),))

    @override
    def update(self, pairs: Mapping[str, tuple[Tensor, Tensor]], factors: Mapping[str, Tensor] | None = None) -> None:
        """Adds (...) predictions and labels by quantity, and factors of their errors; see :func:`masked_loss`.

        Quantities without a weight are ignored.
        """
        totals, counts = torch.zeros_like(self.totals), torch.zeros_like(self.counts)
        for index, name in enumerate(self.weights):
            if name in pairs:
                factor = (factors or {}).get(name)
                totals[index], counts[index] = _summed_loss(*pairs[name], self.huber_delta, factor)
        self.totals = self.totals + totals
        self.counts = self.counts + counts

    @override
    def compute(self) -> Tensor:
        """Returns the loss over all predictions and labels that were added."""
        weights = self.totals.new_tensor(list(self.weights.values()))
        return (weights * self.totals / self.counts.clamp(min=1)).sum()


class MaskedError(_ExactSums):
    """Computes the mean absolute or root mean squared error over the labels that are not NaN; NaN if all are.

    Args:
        squared: Compute the root mean squared error instead of the mean absolute error.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example:
        >>> error = MaskedError()
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.5, float("nan")]))
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, squared: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squared = squared
        self.total: Tensor
        self.count: Tensor
        self.add_sum("total")
        self.add_sum("count")

    @override
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds (...) predictions and labels."""
        known = ~torch.isnan(label)
        error = torch.where(known, prediction - label, 0.0).double()
        self.total = self.total + (error.square() if self.squared else error.abs()).sum()
        self.count = self.count + known.sum()

    @override
    def compute(self) -> Tensor:
        """Returns the error over all predictions and labels that were added."""
        mean = self.total / self.count
        return mean.sqrt() if self.squared else mean
