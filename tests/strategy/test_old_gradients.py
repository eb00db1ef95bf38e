"""Gradients of the last step are freed where Lightning is about to zero them, and nobody may look at them before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from lightning_januspipe.strategy.old_gradients import free_old_gradients


class Looks(Callback):
    """Looks at gradients before they are zeroed."""

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...


class Zeroes(LightningModule):
    """Zeroes gradients itself."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None: ...


@pytest.mark.parametrize(
    ("module", "callbacks", "batch_idx", "is_freed"),
    [
        (LightningModule(), [Callback()], 2, True),
        (LightningModule(), [], 3, False),
        (LightningModule(), [Looks()], 2, False),
        (LightningModule(), [LambdaCallback(on_before_zero_grad=lambda *_: None)], 2, False),
        (Zeroes(), [], 2, False),
    ],
)
def test_old_gradients(module: Any, callbacks: list[Any], batch_idx: int, is_freed: bool) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=batch_idx))
    optimizers = [torch.optim.SGD([parameter], lr=0.1)]
    free_old_gradients(
        SimpleNamespace(
            fit_loop=loop,
            accumulate_grad_batches=2,
            lightning_module=module,
            callbacks=callbacks,
            optimizers=optimizers,
        )
    )
    assert (parameter.grad is None) == is_freed
