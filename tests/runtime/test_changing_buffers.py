"""Buffers that a potential reads, and that the training step changes after its forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from changing_models import running
from compiled_workers import train_interpreted
from graph_models import Data
from parity_check import check_parity
from pools import slow
from torch import nn

from lightning_januspipe.runtime.changing_buffers import ChangingBuffers
from lightning_januspipe.testing import RankPool, train_in_pipeline


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (1, {"num_microbatches": 1, "compile": True}),
        (2, {"num_microbatches": 1, "activation": "recompute"}),
        slow(2, {"num_microbatches": 1}),
        slow(2, {"num_microbatches": 1, "compile": True}),
        slow(2, {"num_microbatches": 1, "pipeline_size": 1, "graph_size": 2}),
    ],
)
def test_phases_of_a_microbatch_read_the_buffers_of_its_start(
    pool: RankPool, devices: int, strategy: dict[str, Any]
) -> None:
    train = train_interpreted if strategy.get("compile") else train_in_pipeline
    check_parity(pool, devices, module=running, data=Data, train=train, **strategy)


class Means(nn.Module):
    """Has buffers, of which two are one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "replaced", "removed", "constant", "late"):
            self.register_buffer(name, torch.tensor([1.0, float("nan")]))
        self.inner = nn.BatchNorm1d(1, affine=False)
        self.register_buffer("same", self.first)

    def in_a_loss(self) -> None:
        """Changes the buffers as a loss does, by operations that count as changes and by one that does not."""
        self.first += 1
        self.replaced = torch.cat([self.replaced, self.first])
        self.removed = None
        self.inner(torch.tensor([[1.0], [3.0]]))


def test_losses_read_what_losses_have_changed_and_phases_do_when_the_step_has_ended() -> None:
    module, plain = Means(), Means()
    buffers, first = ChangingBuffers(module), module.first
    for step in range(3):
        before = {n: b.clone() for n, b in module.state_dict().items()}
        for _ in range(2):
            plain.in_a_loss()
            with buffers.in_loss():
                module.in_a_loss()
                assert_same(module, plain.state_dict())
                with buffers.as_read_by_phases():
                    assert_same(module, before)
            assert_same(module, before)
        buffers.end_step()
        assert_same(module, plain.state_dict())
        assert module.first is module.same is first, step


def test_an_error_leaves_buffers_as_they_were() -> None:
    module = Means()
    buffers, before = ChangingBuffers(module), {n: b.clone() for n, b in module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), buffers.in_loss():
        module.in_a_loss()
        raise ZeroDivisionError
    buffers.clear()
    buffers.end_step()
    assert_same(module, before)


def test_a_buffer_that_changes_later_is_told_once() -> None:
    module = Means()
    buffers = ChangingBuffers(module)
    for step in range(3):
        with pytest.warns(UserWarning, match="left alone: late") if step == 1 else nullcontext(), buffers.in_loss():
            module.in_a_loss()
            if step > 0:
                before = module.late
                module.late *= 2
        assert (module.late is before) == (step == 1) if step else True
        buffers.end_step()
    assert module.late[0] == 4


def assert_same(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """The buffers are these, with NaN."""
    for name, buffer in module.state_dict().items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0, equal_nan=True)
