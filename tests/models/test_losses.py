import math

import pytest
import torch

from lightning_januspipe.models.losses import MaskedError, masked_loss

NAN = float("nan")


def test_loss_skips_missing_labels() -> None:
    prediction = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    loss = masked_loss(prediction, torch.tensor([0.0, 4.0, NAN]))
    assert loss.item() == pytest.approx((1 + 4) / 2)
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [1.0, -2.0, 0.0]


def test_loss_without_labels_is_zero() -> None:
    prediction = torch.ones(2, requires_grad=True)
    loss = masked_loss(prediction, torch.full((2,), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [0.0, 0.0]


def test_huber_loss_is_linear_far_away() -> None:
    loss = masked_loss(torch.tensor([0.05, 3.0]), torch.zeros(2), huber_delta=0.1)
    assert loss.item() == pytest.approx((0.5 * 0.05**2 + 0.1 * (3.0 - 0.05)) / 2)


def test_metric_accumulates_over_batches() -> None:
    absolute, squared = MaskedError(), MaskedError(squared=True)
    for metric in (absolute, squared):
        metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, NAN]))
        metric.update(torch.tensor([[3.0]]), torch.tensor([[0.0]]))
    assert absolute.compute().item() == pytest.approx(2.0)
    assert squared.compute().item() == pytest.approx(math.sqrt(5.0))


def test_metric_without_labels_is_nan() -> None:
    metric = MaskedError()
    metric.update(torch.ones(2), torch.full((2,), NAN))
    assert metric.compute().isnan()
