"""Rows are multiplied by the matrices of their structures, to any order of derivatives."""

from __future__ import annotations

import pytest
import torch

from lightning_januspipe.capture.segment_linear import segment_linear


@pytest.mark.parametrize("index", [[0, 0, 1, 3, 3, 3], [3, 0, 1, 3, 0, 3], []])
@pytest.mark.parametrize("inner", [(), (2,)])
def test_equals_a_loop(index: list[int], inner: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    of_rows = torch.tensor(index, dtype=torch.int64)
    x = torch.randn(len(index), *inner, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    expected = [row @ weights[b].T for row, b in zip(x, index, strict=True)]
    found = segment_linear(x, weights, of_rows)
    assert found.shape == (len(index), *inner, 5)
    if index:
        torch.testing.assert_close(found, torch.stack(expected))
        assert torch.autograd.gradcheck(lambda a, w: segment_linear(a, w, of_rows), (x, weights))
        assert torch.autograd.gradgradcheck(lambda a, w: segment_linear(a, w, of_rows), (x, weights))
