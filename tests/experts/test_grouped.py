"""Rows are multiplied by the matrices of their groups, to any order of derivatives."""

from __future__ import annotations

import pytest
import torch

from lightning_januspipe.experts import grouped_linear


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
