"""Rows are multiplied by the matrices of their groups, to any order of derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_januspipe.experts import grouped, grouped_linear


@pytest.mark.parametrize("index", [[0, 0, 1, 3, 3, 3], [3, 0, 1, 3, 0, 3], []])
@pytest.mark.parametrize("inner", [(), (2,)])
def test_equals_a_loop(index: list[int], inner: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    of_rows = torch.tensor(index, dtype=torch.int64)
    x = torch.randn(len(index), *inner, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = [row @ weights[b] for row, b in zip(x, index, strict=True)]
    found = grouped_linear(x, weights, of_rows)
    assert found.shape == (len(index), *inner, 5)
    if index:
        torch.testing.assert_close(found, torch.stack(expected))
        assert torch.autograd.gradcheck(lambda a, w: grouped_linear(a, w, of_rows), (x, weights))
        assert torch.autograd.gradgradcheck(lambda a, w: grouped_linear(a, w, of_rows), (x, weights))


def test_shapes_and_groups_that_do_not_fit() -> None:
    x, weights = torch.ones(2, 3), torch.ones(4, 3, 5)
    with pytest.raises(ValueError, match=r"x of shape \(2, 3\), weight of shape \(4, 5, 3\).*expected \(R, ..., I\)"):
        grouped_linear(x, weights.transpose(1, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="a row is of group 4, but there are 4 matrices"):
        grouped_linear(x, weights, torch.tensor([0, 4]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear_maps(dtype: torch.dtype) -> None:
    """Second derivatives too: rows are in half precision, and gradients of matrices in float32."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, requires_grad=True)
    weights = torch.randn(4, 5, 3, requires_grad=True)  # as those of nn.Linear
    index = torch.tensor([0, 0, 1, 3, 3, 3])

    def gradients(forward: Callable[[], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            out = forward()
            assert out.dtype == dtype
            (force,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(force.square().sum(), [x, weights]))

    expected = gradients(lambda: torch.cat([nn.functional.linear(x[i, None], weights[b]) for i, b in enumerate(index)]))
    found = gradients(lambda: grouped_linear(x, weights.transpose(1, 2), index))
    assert [g.dtype for g in found] == [torch.float32] * 2
    for ours, others in zip(found, expected, strict=True):
        assert (ours - others).norm() < 4 * torch.finfo(dtype).eps * others.norm()
    with pytest.raises(ValueError, match="expected the same type for both outside autocast"):
        grouped_linear(x.to(dtype), weights.transpose(1, 2), index)


@pytest.mark.parametrize("index", [[0, 0, 1, 3, 3, 3], [3, 0, 1, 3, 0, 3], [2] * 6])
def test_products_of_torch_are_those_of_the_loop(index: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(6, 4), torch.randn(4, 4, 8)
    products = grouped._GROUPED_MM
    calls: list[int] = []

    def counted(*operands: Tensor, offs: Tensor) -> Tensor:
        calls.append(len(operands))
        result: Tensor = products(*operands, offs=offs)
        return result

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        rows, matrices = (t.to(dtype, copy=True).requires_grad_() for t in (x, weights))
        energy = grouped_linear(rows, matrices, torch.tensor(index)).square().sum()
        (force,) = torch.autograd.grad(energy, rows, create_graph=True)
        return [force.detach(), *torch.autograd.grad(force.square().sum(), [rows, matrices])]

    monkeypatch.setattr(grouped, "_GROUPED_MM", products and counted)
    found, expected = gradients(torch.float32), gradients(torch.float64)
    assert bool(calls) == (products is not None)
    for ours, others in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, others.float(), rtol=1e-5, atol=1e-4)


def test_operations_that_torch_counts_are_those_of_the_loop() -> None:
    index = [0, 2, 1, 2, 2]
    x, weights = torch.randn(5, 3, requires_grad=True), torch.randn(3, 3, 4, requires_grad=True)

    def counted(forward: Callable[[], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            first = torch.autograd.grad(forward().square().sum(), [x, weights], create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in first), [x, weights])
        return counter.get_total_flops()

    loop = counted(lambda: torch.cat([x[i, None] @ weights[b] for i, b in enumerate(index)]))
    assert counted(lambda: grouped_linear(x, weights, torch.tensor(index))) == loop > 0
