"""Backward passes in two parts against one: same gradients, no product twice, none too early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Scaled

from lightning_januspipe.engine.weight_split import (
    PATH,
    WEIGHTS,
    BackwardGraph,
    Roots,
    explore,
    walk_graph,
    walk_to_parameters,
)

FLOAT = torch.float64


def layers(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    return [torch.tanh(torch.tanh(h @ w + b) @ v + b)]


def tied(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    return [torch.tanh((torch.tanh(h @ w) * b) @ w.T * b) @ v]


def shared_network(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    filters = torch.tanh(b @ v) * v.sum()  # parameters only, and read by every layer
    return [torch.tanh(torch.tanh(h @ w * filters) @ w * filters) * filters.square()]


def several_outputs(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    g = h @ w
    return [g, g.square() @ v, b, (b * v).sum(), h, h.sum() + 0.0 * b]


def written_in_python(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    first = b * v.sum(0)
    return [Scaled.apply(torch.tanh(Scaled.apply(h @ w, first)), first * b) @ w, Scaled.apply(h, b)]


def complex_values(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    wave = torch.exp(1j * (h @ w)) * b  # a real parameter times a complex value
    return [wave, (wave @ torch.complex(v, w)).abs(), wave.real * b]


def other_precision(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    return [(h.float() @ w.float()).double() @ v, h * b.float()]


def in_place(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    g = torch.zeros_like(h).index_add_(0, torch.tensor([0, 0, 2]), h @ w)
    g[:, 1:].mul_(b[1:])
    g[0] += b
    return [g @ v]


def with_dead_ends(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    other = torch.ones(3, 4, dtype=FLOAT, requires_grad=True)
    return [(h * (other @ other.T).sum()) @ w + (other * b) @ v]


def without_boundary(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    return [torch.tanh(w @ v) * b]


def without_parameters(h: Tensor, w: Tensor, v: Tensor, b: Tensor) -> list[Tensor]:
    return [torch.tanh(h)]


NETWORKS: list[Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]] = [
    layers,
    tied,
    shared_network,
    several_outputs,
    written_in_python,
    complex_values,
    other_precision,
    in_place,
    with_dead_ends,
    without_boundary,
    without_parameters,
]


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4), (4, 4), (4, 4), (4,)
    return [torch.randn(s, generator=generator, dtype=FLOAT).requires_grad_() for s in shapes]


def split(roots: list[Tensor], boundary: Tensor, parameters: list[Tensor]) -> tuple[BackwardGraph, Roots]:
    edges = [(get_gradient_edge(r), torch.ones_like(r)) for r in roots]
    flags = {boundary: PATH, **dict.fromkeys(parameters, WEIGHTS)}
    return explore((e.node for e, _ in edges), flags), edges


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("defer", [False, True])
def test_gradients_of_both_parts_are_those_of_one(network: Any, defer: bool) -> None:
    boundary, *parameters = leaves()
    outputs = network(boundary, *parameters)
    graph, roots = split(outputs, boundary, parameters)
    ones = [torch.ones_like(o) for o in outputs]
    expected = torch.autograd.grad(outputs, [boundary, *parameters], ones, retain_graph=True, allow_unused=True)

    inputs = [boundary] if defer else [boundary, *parameters]
    found, kept, deferred = walk_graph(graph, roots, inputs, defer=defer, retain_graph=False)
    if deferred is not None:
        found += walk_to_parameters(deferred, parameters, retain_graph=False)[0]

    assert kept == [] and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12 if network is not other_precision else 1e-6, atol=1e-12)


class Operations(TorchDispatchMode):
    """Counts operations that compute: products, and sums and products of elements."""

    NAMES = ("mm", "bmm", "mul", "sum", "tanh_backward", "add", "index_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names += [name] * (name in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("network", [layers, tied, shared_network, in_place, with_dead_ends])
def test_nothing_is_computed_twice(network: Any) -> None:
    boundary, *parameters = leaves()
    outputs = network(boundary, *parameters)
    graph, roots = split(outputs, boundary, parameters)
    with Operations() as whole:
        walk_graph(graph, roots, [boundary, *parameters], defer=False, retain_graph=True)
    with Operations() as first:
        _, _, deferred = walk_graph(graph, roots, [boundary], defer=True, retain_graph=True)
    with Operations() as alone:
        torch.autograd.grad([r for r, _ in roots], boundary, [g for _, g in roots], retain_graph=True)
    assert deferred is not None
    with Operations() as second:
        walk_to_parameters(deferred, parameters, retain_graph=False)
    assert sorted(first.names) == sorted(alone.names), "the first part does more than the critical path"
    assert sorted(first.names + second.names) == sorted(whole.names)
    assert "mm" in first.names and "mm" in second.names


def test_functions_written_in_python_run_again_for_their_parameters() -> None:
    boundary, *parameters = leaves()
    graph, roots = split(written_in_python(boundary, *parameters), boundary, parameters)
    Scaled.num_backward = 0
    _, _, deferred = walk_graph(graph, roots, [boundary], defer=True, retain_graph=True)
    assert Scaled.num_backward == 3 and deferred is not None
    walk_to_parameters(deferred, parameters, retain_graph=False)
    assert Scaled.num_backward == 6, "each join runs once more"


def test_explore() -> None:
    h, w, _, b = leaves()
    inner = h @ w
    filters = b.exp()
    other = torch.ones(4, dtype=FLOAT, requires_grad=True).exp()
    outer = inner * filters + other
    flags = {h: PATH, w: WEIGHTS, b: WEIGHTS}
    node = outer.grad_fn
    assert node is not None and inner.grad_fn is not None and filters.grad_fn is not None and other.grad_fn is not None
    product = node.next_functions[0][0]
    assert product is not None

    graph = explore([node], flags)
    assert [graph.leads_to[n] for n in (node, product, filters.grad_fn, other.grad_fn)] == [
        PATH | WEIGHTS,
        PATH | WEIGHTS,
        WEIGHTS,
        0,
    ]
    assert graph.entered == set()
    assert graph.joins.keys() == {product, inner.grad_fn}
    assert graph.joins[product] == [(1, filters.grad_fn, 0)]

    entered = explore([inner.grad_fn], flags)
    graph = explore([node], flags, entered)
    assert graph.entered == {inner.grad_fn}, "leaves are not entered"
    assert graph.joins.keys() == {product}


def test_the_walk_stops_where_another_graph_begins() -> None:
    h, w, v, b = leaves()
    inner, filters = h @ w, torch.tanh(b)
    flags = {h: PATH, w: WEIGHTS, v: WEIGHTS, b: WEIGHTS}
    assert inner.grad_fn is not None and filters.grad_fn is not None
    entered = explore([inner.grad_fn, filters.grad_fn], flags)
    outer = (inner @ v) * (filters * v.sum())
    root = (get_gradient_edge(outer), torch.ones_like(outer))
    graph = explore([root[0].node], flags, entered)

    (found,), kept, deferred = walk_graph(graph, [root], [h], defer=True, retain_graph=True)
    assert found is None, "h is behind the border"
    assert [e.node for e, _ in kept] == [inner.grad_fn] and deferred is not None
    gradients, later = walk_to_parameters(deferred, [w, v, b], retain_graph=True)
    assert [e.node for e, _ in later] == [filters.grad_fn]
    assert gradients[0] is None and gradients[2] is None

    a, c, d = inner.detach().requires_grad_(), filters.detach().requires_grad_(), v.detach().requires_grad_()
    expected = torch.autograd.grad(((a @ d) * (c * d.sum())).sum(), [a, c, d])
    for x, y in zip([kept[0][1], later[0][1], gradients[1]], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_hooks_are_lifted_after_an_error() -> None:
    h, w, _, _ = leaves()

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise FloatingPointError("in the midst of a walk")

    inner = h @ w
    assert inner.grad_fn is not None
    outer = torch.tanh(inner) * Failing.apply(inner)
    flags = {h: PATH, w: WEIGHTS}
    root = (get_gradient_edge(outer), torch.ones_like(outer))
    for graph in (
        explore([root[0].node], flags),
        explore([root[0].node], flags, explore([inner.grad_fn], flags)),
    ):
        with pytest.raises(FloatingPointError, match="in the midst"):
            walk_graph(graph, [root], [h], defer=True, retain_graph=True)
        (gradient,) = torch.autograd.grad(torch.tanh(inner).sum(), h, retain_graph=True)
        assert gradient.abs().max() > 0, "a hook still stops the gradient"


def test_roots_inside_the_other_graph_are_kept() -> None:
    h, w, _, b = leaves()
    inner, filters = h @ w, torch.tanh(b)
    flags = {h: PATH, w: WEIGHTS, b: WEIGHTS}
    assert inner.grad_fn is not None and filters.grad_fn is not None
    entered = explore([inner.grad_fn, filters.grad_fn], flags)
    roots = [(get_gradient_edge(r), torch.full_like(r, i + 1.0)) for i, r in enumerate((inner, filters))]
    graph = explore((e.node for e, _ in roots), flags, entered)
    (found,), kept, deferred = walk_graph(graph, roots, [h], defer=True, retain_graph=True)
    assert found is None and deferred is not None
    gradients, later = walk_to_parameters(deferred, [w, b], retain_graph=True)
    assert gradients == [None, None]
    assert [(e.node, float(g.mean())) for e, g in kept + later] == [(inner.grad_fn, 1.0), (filters.grad_fn, 2.0)]


def test_what_was_deferred_is_let_go() -> None:
    boundary, *parameters = leaves()
    graph, roots = split([*layers(boundary, *parameters), parameters[0].exp()], boundary, parameters)
    _, _, deferred = walk_graph(graph, roots, [boundary], defer=True, retain_graph=True)
    assert deferred is not None and deferred.joins and deferred.roots
    walk_to_parameters(deferred, parameters, retain_graph=False)
    assert not deferred.joins and not deferred.roots
