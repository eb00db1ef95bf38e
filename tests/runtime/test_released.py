"""Parameters whose memory is released and whose gradients are in shards; both come and go independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_januspipe.runtime.released import allow_gradient, guard_gradient, hide, show


@pytest.mark.parametrize("is_hidden_first", [True, False])
def test_a_gradient_stays_guarded_while_values_come_and_go(is_hidden_first: bool) -> None:
    parameter = nn.Parameter(torch.ones(2))
    if is_hidden_first:
        hide(parameter, "scale")
    guard_gradient(parameter, "scale")
    for _ in range(2):
        show(parameter)
        assert parameter.sum() == 2
        with pytest.raises(RuntimeError, match="gradient of scale is in parts"):
            _ = parameter.grad
        hide(parameter, "scale")
        with pytest.raises(RuntimeError, match="scale"):
            parameter.sum()
        with pytest.raises(RuntimeError, match="gradient of scale is in parts"):
            parameter.grad = None
    allow_gradient(parameter)
    assert parameter.grad is None
    show(parameter)
    assert type(parameter) is nn.Parameter and not vars(parameter)
