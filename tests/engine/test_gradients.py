"""Sums of gradients, their accumulation into ``.grad``, and their reduction over ranks."""

from __future__ import annotations

import pytest
import torch
from engine_workers import reduce_some
from torch import nn

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.testing import RankPool


def _parameters(num: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(num)]


def test_adds_up() -> None:
    (p,) = _parameters(1)
    buffers = GradientBuffers()
    assert buffers.get(p) is None
    for value in (1.0, 2.0, 4.0, 8.0):
        buffers.add([p], [torch.full((3,), value, dtype=torch.float64)])
        buffers.add([p], [None])
    assert buffers.get(p).tolist() == [15.0] * 3  # type: ignore[union-attr]


def test_one_tensor_for_two_parameters() -> None:
    """As ``autograd.grad`` returns for p + q: adding to one sum must not change the other, nor autograd's tensor."""
    p, q = _parameters(2)
    buffers = GradientBuffers()
    given = []
    for value in (1.0, 2.0, 4.0):
        shared = torch.full((3,), value, dtype=torch.float64)
        given.append(shared)
        buffers.add([p, q], [shared, shared])
    buffers.add([p], [torch.full((3,), 8.0, dtype=torch.float64)])
    assert buffers.get(p).tolist() == [15.0] * 3  # type: ignore[union-attr]
    assert buffers.get(q).tolist() == [7.0] * 3  # type: ignore[union-attr]
    assert [g[0].item() for g in given] == [1.0, 2.0, 4.0]


def test_parameter_twice_in_one_call() -> None:
    (p,) = _parameters(1)
    buffers = GradientBuffers()
    one = torch.ones(3, dtype=torch.float64)
    buffers.add([p, p, p], [one, one, one])
    assert buffers.get(p).tolist() == [3.0] * 3  # type: ignore[union-attr]
    assert one.tolist() == [1.0] * 3


def test_sums_are_added_to_the_gradient_and_forgotten() -> None:
    p, q, r = _parameters(3)
    p.grad = torch.full((3,), 10.0, dtype=torch.float64)
    before, ours = p.grad, torch.full((3,), 4.0, dtype=torch.float64)
    buffers = GradientBuffers()
    buffers.add([p, q], [ours, ours])
    buffers.accumulate_into_grad(0.5)
    assert p.grad.tolist() == [12.0] * 3 and q.grad is not None and q.grad.tolist() == [2.0] * 3
    assert r.grad is None
    assert before.tolist() == [10.0] * 3 and ours.tolist() == [4.0] * 3
    q.grad.add_(1.0)
    assert p.grad.tolist() == [12.0] * 3, "the two parameters share memory"
    buffers.accumulate_into_grad(1.0)
    assert p.grad.tolist() == [12.0] * 3 and buffers.get(p) is None


def test_accumulated_gradients_do_not_share_memory_with_the_sum() -> None:
    p, q = _parameters(2)
    shared = torch.ones(3, dtype=torch.float64)
    buffers = GradientBuffers()
    buffers.add([p, q], [shared, shared])
    buffers.accumulate_into_grad(1.0)
    assert p.grad is not None and q.grad is not None
    p.grad.zero_()
    assert q.grad.tolist() == [1.0] * 3 and shared.tolist() == [1.0] * 3


def test_accumulated_gradient_has_the_parameters_dtype() -> None:
    (p,) = _parameters(1, torch.float32)
    buffers = GradientBuffers()
    buffers.add([p], [torch.ones(3, dtype=torch.float64)])
    buffers.accumulate_into_grad(1.0)
    assert p.grad is not None and p.grad.dtype == torch.float32


def test_clear() -> None:
    (p,) = _parameters(1)
    buffers = GradientBuffers()
    buffers.add([p], [torch.ones(3, dtype=torch.float64)])
    buffers.clear()
    buffers.accumulate_into_grad(1.0)
    assert p.grad is None


@pytest.mark.parametrize("divide_by", [1, 3])
def test_reduce(pool: RankPool, divide_by: int) -> None:
    results = pool.run(reduce_some, divide_by, world_size=3)
    expected = {"everywhere": 1 + 2 + 3, "first only": 1, "last only": 3, "single": 6}
    for found in results:
        assert found["nowhere"] is None and found["frozen"] is None
        for name, total in expected.items():
            gradient = found[name]
            assert gradient is not None
            torch.testing.assert_close(gradient, torch.full_like(gradient, total / divide_by))
        assert found["first only"].dtype == torch.float32 and found["last only"].shape == ()
        transposed = 6 * torch.arange(6.0, dtype=torch.float64).view(2, 3).t() / divide_by
        torch.testing.assert_close(found["transposed"], transposed)
