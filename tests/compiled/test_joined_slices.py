"""Sums of slices become concatenations whose parts are used by themselves, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_models import Step, Traced, assert_parity, make_batch
from compiled_models import factory, joint_graphs
from graph_models import Degrees
from torch import Tensor, fx

from lightning_januspipe.compiled import torch_internals as internals
from lightning_januspipe.compiled.joined_slices import join_slices
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.phase_graphs import phase_graphs
from lightning_januspipe.compiled.sizes import StageSizes

ATEN = torch.ops.aten
Function = Callable[..., list[Tensor]]


def joined(function: Function, *shapes: tuple[int | None, ...], rows: int = 5, edges: int = 7) -> fx.GraphModule:
    """Returns the graph of ``function(rows, index, *tensors)`` after the pass; None in a shape stands for ``rows``."""
    mode = internals.symbolic_mode()
    size, num_edges = internals.new_size(mode, "rows", rows), internals.new_size(mode, "edges", edges)
    with mode:
        index = torch.empty(num_edges, dtype=torch.int64)
        tensors = [torch.empty([size if n is None else n for n in shape], dtype=torch.float64) for shape in shapes]
    traced = internals.traced_graph(function, [size, index, *tensors])
    traced.graph.eliminate_dead_code()
    guards = internals.size_guards(mode)
    found = join_slices(Joint(traced.graph, traced, [], [], mode, StageSizes({}, {})))
    assert internals.size_guards(mode) == guards, "fewer sizes are right for the graph than before"
    return fx.GraphModule(traced, found.graph)


def check(function: Function, *shapes: tuple[int | None, ...]) -> fx.GraphModule:
    """Compares the graph after the pass with the function, for other sizes too; returns the graph."""
    graph = joined(function, *shapes)
    for rows, edges in ((5, 7), (3, 1), (1, 4), (2, 0)):
        index = torch.randint(rows, (edges,))
        tensors = [torch.randn([rows if n is None else n for n in shape], dtype=torch.float64) for shape in shapes]
        for found, expected in zip(graph(rows, index, *tensors), function(rows, index, *tensors), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    return graph


def count(graph: fx.GraphModule, target: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))


def written(x: Tensor, part: Tensor, start: int, end: int) -> Tensor:
    return torch.zeros_like(x).slice_scatter(part, 1, start, end)


def test_slices_side_by_side() -> None:
    def function(_: Any, __: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
        return [written(x, x[:, :4].sin(), 0, 4) + (x + written(x, x[:, 4:].cos(), 4, 9)), x + bias]

    graph = check(function, (None, 9), (9,))
    assert (count(graph, ATEN.slice_scatter.default), count(graph, ATEN.cat.default)) == (0, 1)


def test_gaps_and_intervals_that_occur_twice() -> None:
    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        terms = [(x[:, :2].sin(), 1, 3), (x[:, :2].cos(), 1, 3), (x[:, :3].exp(), -4, 8)]
        return [sum((written(x, part, start, end) for part, start, end in terms), torch.zeros_like(x))]

    graph = check(function, (None, 9))
    assert count(graph, ATEN.slice_scatter.default) == 0


def test_intervals_that_overlap_stay() -> None:
    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        return [written(x, x[:, :4].sin(), 0, 4) + written(x, x[:, :4].cos(), 3, 7)]

    assert count(check(function, (None, 9)), ATEN.slice_scatter.default) == 2


def test_what_is_written_into_other_values_stays() -> None:
    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        ones = torch.ones_like(x)
        return [ones.slice_scatter(x[:, :4], 1, 0, 4) + ones.slice_scatter(x[:, 4:], 1, 4, 9)]

    assert count(check(function, (None, 9)), ATEN.slice_scatter.default) == 2


def test_values_that_lie_otherwise_in_memory() -> None:
    """What is written into zeros may be transposed; a view of the zeros is no view of it."""

    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        turned = x.t().contiguous().t()
        whole = torch.zeros_like(x).slice_scatter(turned, 1, 0, 6)
        halves = whole + (x.new_zeros(x.shape).slice_scatter(turned[:, :3], 1, 0, 3) + written(x, turned[:, 3:], 3, 6))
        return [whole.view(-1), (2 * whole).view(-1, 3), halves.view(-1)]

    graph = check(function, (None, 6))
    assert count(graph, ATEN.slice_scatter.default) == 0
    for node in graph.graph.nodes:
        if node.target is ATEN.mul.Tensor:
            assert str(node.meta["val"].stride(0)) == "1", "as the transposed values lie"


def test_graphs_that_name_places_in_memory_stay() -> None:
    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        total = written(x, x[:, :4].sin(), 0, 4) + written(x, x[:, 4:].cos(), 4, 9)
        return [total.as_strided((1, 3), (9, 2))]

    assert count(check(function, (None, 9)), ATEN.slice_scatter.default) == 2


def test_a_sum_that_is_used_twice_is_made_once() -> None:
    def function(_: Any, __: Tensor, x: Tensor) -> list[Tensor]:
        total = written(x, x[:, :4].sin(), 0, 4) + written(x, x[:, 4:].cos(), 4, 9)
        return [total + x, total * 2]

    graph = check(function, (None, 9))
    assert count(graph, ATEN.cat.default) == 1


@pytest.mark.parametrize("is_put", [True, False])
def test_concatenated_columns_are_summed_into_rows_part_by_part(is_put: bool) -> None:
    def function(rows: Any, index: Tensor, x: Tensor) -> list[Tensor]:
        edges = x[index]
        columns = torch.cat([edges[:, :4].sin(), torch.zeros_like(edges[:, :2]), edges[:, 4:].cos()], 1)
        zeros = columns.new_zeros(rows, 11)
        if is_put:
            total = zeros.index_put([index], columns, accumulate=True)
        else:
            total = zeros.scatter_add(0, index.unsqueeze(1).expand(-1, 11), columns)
        return [total[:, :6].exp(), total[:, 6:], total[:, 1:3]]

    graph = check(function, (None, 9))
    rows = count(graph, ATEN.index_put.default) + count(graph, ATEN.scatter_add.default)
    assert rows == 2, "nothing is summed for columns of zeros"
    (whole,) = [n for n in graph.graph.find_nodes(op="call_function", target=ATEN.cat.default) if len(n.args[0]) == 3]
    (user,) = whole.users
    assert user.args[2:] == (1, 3), "only what is no part is sliced from the concatenation"


def test_second_derivatives_of_sliced_features() -> None:
    """As of a tensor product: degrees are slices, messages are summed into rows."""

    def function(rows: Any, index: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        x, weight = x.detach().requires_grad_(True), weight.detach().requires_grad_(True)
        with torch.enable_grad():
            scalars, vectors = x[:, :3], x[:, 3:].reshape(-1, 3, 3)
            lengths = (vectors * vectors).sum(-1)
            messages = torch.cat([scalars * lengths, (vectors * scalars.unsqueeze(-1)).reshape(-1, 9)], 1)
            sums = x.new_zeros(rows, 12).index_add(0, index, messages[index])
            energy = ((sums @ weight) * sums).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return [force, *torch.autograd.grad(force.square().sum(), [x, weight])]

    graph = check(function, (None, 12), (12, 12))
    assert count(graph, ATEN.slice_scatter.default) == 0


@pytest.mark.parametrize(("num_stages", "defer"), [(1, False), (2, True)])
def test_phases_of_sliced_features(num_stages: int, defer: bool) -> None:
    """Parameter gradients of a loss of forces are those of the undivided potential."""
    traced = Traced(Step(Degrees(2)))
    captured = traced.cut(num_stages)
    joints = joint_graphs(traced, captured)
    guards = [internals.size_guards(joint.mode) for joint in joints]
    graphs = [phase_graphs(joint, "pointwise", defer) for joint in joints]
    assert [internals.size_guards(joint.mode) for joint in joints] == guards
    written_before, written_now = (
        sum(len(g.find_nodes(op="call_function", target=ATEN.slice_scatter.default)) for g in found)
        for found in ([j.graph for j in joints], [m.graph for stage in graphs for m in stage.modules.values()])
    )
    assert written_now < written_before / 2
    assert_parity(captured, traced.module, make_batch((2, 5, 3), seed=1), make_stage=factory(graphs), defer=defer)
