"""Products of many small matrices are written out; other products stay as they are."""

from __future__ import annotations

import pytest
import torch

from lightning_januspipe.compiled import torch_internals as internals
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of


def products_of(graph: torch.fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default))


def traced(shape: tuple[int, int, int], dtype: torch.dtype, rows: int = 5) -> torch.fx.GraphModule:
    """Returns the graph of products of matrices [a, b] and [b, c], for any number of them."""
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", rows)
    with mode:
        first, second = (torch.empty([size, *shape[i : i + 2]], dtype=dtype) for i in (0, 1))
    return internals.traced_graph(lambda _, a, b: [a @ b], [size, first, second])


@pytest.mark.parametrize("shape", [(4, 2, 32), (1, 9, 3), (32, 5, 1), (35, 9, 32)])
def test_small_products_are_written_out(shape: tuple[int, int, int]) -> None:
    graph = traced(shape, torch.float64)
    assert not products_of(graph)
    for num in (3, 1, 0):
        first, second = (torch.randn(num, *shape[i : i + 2], dtype=torch.float64) for i in (0, 1))
        (found,) = graph(num, first, second)
        torch.testing.assert_close(found, first @ second, rtol=1e-13, atol=1e-13)


def test_views_of_products_of_transposed_matrices() -> None:
    """Results are contiguous, as those of bmm are."""
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", 5)
    with mode:
        first, second = torch.empty(3, size, 2).transpose(0, 1), torch.empty(size, 2, 4)
    graph = internals.traced_graph(lambda n, a, b: [torch.bmm(a, b).view(n, 12)], [size, first, second])
    assert not products_of(graph)
    first, second = torch.randn(3, 7, 2).transpose(0, 1), torch.randn(7, 2, 4)
    torch.testing.assert_close(graph(7, first, second)[0], torch.bmm(first, second).view(7, 12))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 10, 4), torch.float64),
        ((64, 4, 64), torch.float64),
        ((4, 4, 4), torch.bfloat16),
        ((4, 0, 4), torch.float64),
    ],
)
def test_other_products_stay(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert products_of(traced(shape, dtype)) == 1


@pytest.mark.parametrize(("dims", "work"), [([1], "POINTWISE"), ([1, 2], "SUM"), ([0], "SUM"), ([0, 1], "SUM")])
def test_short_sums_are_pointwise(dims: list[int], work: str) -> None:
    """Those over nine numbers, whatever the number of rows."""
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", 5)
    with mode:
        x = torch.empty(size, 9, 2)
    graph = internals.traced_graph(lambda _, x: [x.sum(dims)], [size, x]).graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    assert work_of(node) is KindOfWork[work]


@pytest.mark.parametrize(
    ("terms", "columns", "work"), [(16, 64, "POINTWISE"), (16, 60, "SUM"), (17, 96, "SUM"), (0, 3, "SUM")]
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_that_lengthen_rows_are_computed_again(terms: int, columns: int, work: str, bias: bool) -> None:
    """As the last layer of a radial network, whose results are the weights of a tensor product."""
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", 5)
    with mode:
        rows, weight, added = torch.empty(size, terms), torch.empty(columns, terms), torch.empty(columns)
    inputs = [size, rows, weight, added]
    graph = internals.traced_graph(
        lambda _, x, w, b: [torch.nn.functional.linear(x, w, b if bias else None)], inputs
    ).graph
    (node,) = [n for n in graph.nodes if n.op == "call_function" and "mm" in n.name]
    assert work_of(node) is KindOfWork[work]


def test_parts_that_are_written_into_zeros_are_pointwise() -> None:
    mode = internals.symbolic_mode()
    size = internals.new_size(mode, "rows", 5)
    with mode:
        x, part = torch.empty(size, 9), torch.empty(size, 3)
    graph = internals.traced_graph(lambda _, x, part: [x.slice_scatter(part, 1, 2, 5)], [size, x, part]).graph
    (node,) = [n for n in graph.nodes if "slice_scatter" in n.name]
    assert work_of(node) is KindOfWork.POINTWISE
