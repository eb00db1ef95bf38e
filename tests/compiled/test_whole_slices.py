"""The gradient of a slice that takes all rows is compiled where strides change, and stays right."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_januspipe.compiled import torch_internals as internals
from lightning_januspipe.compiled import whole_slices


def derivatives(size: int, values: torch.Tensor) -> list[torch.Tensor]:
    """Returns a first and a second derivative of a function that slices transposed values, shape ``[4, size, 3]``."""
    values = values.detach().requires_grad_(True)
    with torch.enable_grad():
        turned = values.permute(1, 0, 2)
        energy = (turned[:, :1] ** 3).sum() + (turned[:, :] ** 2).sum()
        (force,) = torch.autograd.grad(energy, values, create_graph=True)
        (second,) = torch.autograd.grad((force**2).sum(), values)
    return [force, second]


def traced() -> tuple[torch.fx.GraphModule, internals.FakeTensorMode]:
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", 5)
    with mode:
        values = torch.empty(4, size, 3, dtype=torch.float64)
    return internals.traced_graph(derivatives, [size, values]), mode


def whole_copies(graph: torch.fx.GraphModule) -> int:
    """Returns how often a graph copies into all rows of a tensor."""
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.slice_scatter.default)
    return sum(sys.maxsize in node.args for node in nodes)


def test_no_copy_into_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = traced()
    assert not whole_copies(graph)
    for num in (7, 1, 0):
        values = torch.randn(4, num, 3, dtype=torch.float64)
        for found, expected in zip(graph(num, values), derivatives(num, values), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(internals, "gradient_of_slice", whole_slices.slice_backward)
    assert whole_copies(traced()[0])


@pytest.mark.slow
def test_it_is_compiled() -> None:
    graph, mode = traced()
    compiled = internals.compiled(graph, mode)
    values = torch.randn(4, 7, 3, dtype=torch.float64)
    for found, expected in zip(compiled(7, values), derivatives(7, values), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
