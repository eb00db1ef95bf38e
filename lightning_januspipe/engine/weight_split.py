"""Runs a backward pass in two parts: first what the next stage waits for, later what only parameters wait for.

This is the weight-gradient split of zero-bubble schedules (arXiv 2401.10241) for graphs that are walked twice. Nodes
of an autograd graph lead to something on the critical path (a boundary value, a seed), or to parameters only. The
first part walks along the critical path: autograd skips every product whose result nothing asks for. At each *join*, a
node of the critical path with an edge to parameters, it records the gradients that arrive. The second part calls the
joins again for their other outputs, and goes on from there to the parameters. No product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.autograd.graph import Node as GraphNode

PATH, WEIGHTS = 1, 2
"""Bits that say what a node leads to: something on the critical path, parameters."""

_Prehook = Callable[[tuple[Tensor | None, ...]], tuple[None, ...] | None]

Roots = list[tuple[GradientEdge, Tensor]]
"""Where to start a walk, with the gradients that arrive there."""

Branch = tuple[int, GraphNode, int]
"""An edge of a join that leads to parameters only: index of the join's output, next node, index of its input."""


@dataclass(frozen=True)
class BackwardGraph:
    """Describes the nodes of one autograd graph.

    Attributes:
        leads_to: A sum of ``PATH`` and ``WEIGHTS`` for each node, also for the nodes of the graph that this one enters.
        joins: The branches of nodes on the critical path.
        entered: Nodes of another graph that edges of this one lead to, without leaves.
    """

    leads_to: dict[GraphNode, int]
    joins: dict[GraphNode, list[Branch]]
    entered: set[GraphNode]


@dataclass
class DeferredWeights:
    """Holds what a walk has left for later.

    Attributes:
        roots: Where gradients arrived that only parameters wait for.
        joins: Joins, their branches, and the gradients that arrived.
        borders: Where to stop and keep the gradients, because another graph begins there.
        alive: Where the walk began, if a join is written in Python: with torch 2.11 only the graph keeps it alive.
    """

    roots: Roots = field(default_factory=list)
    joins: list[tuple[GraphNode, list[Branch], tuple[Tensor | None, ...]]] = field(default_factory=list)
    borders: set[GraphNode] = field(default_factory=set)
    alive: Roots = field(default_factory=list)


def explore(
    roots: Iterable[GraphNode], leaves: Mapping[Tensor, int], entered: BackwardGraph | None = None
) -> BackwardGraph:
    """Finds, for each node of a graph of autograd, which kinds of leaves a backward pass reaches from it.

    The graph is walked once, from its roots to its leaves.

    Args:
        roots: The nodes where a backward pass begins.
        leaves: The kind of each leaf whose gradient is wanted: ``PATH`` or ``WEIGHTS``. Other leaves count as none.
        entered: A graph that was explored before. Where the present graph reaches one of its nodes, the walk stops.

    Returns:
        The kinds that each node leads to, the branches of the critical path that lead to parameters only, and the
        nodes where the graph enters ``entered``.
    """
    known = {} if entered is None else entered.leads_to
    leads_to = dict(known)
    joins: dict[GraphNode, list[Branch]] = {}
    borders: set[GraphNode] = set()
    edges_of: dict[GraphNode, tuple[tuple[GraphNode | None, int], ...]] = {}
    stack = list(roots)
    borders.update(n for n in stack if n in known)
    while stack:
        node = stack[-1]
        if node in leads_to:
            stack.pop()
            continue
        edges = edges_of.get(node)
        if edges is None:
            edges = edges_of[node] = node.next_functions
            if not edges:  # AccumulateGrad
                variable = getattr(node, "variable", None)
                leads_to[node] = 0 if variable is None else leaves.get(variable, 0)
            for following, _ in edges:
                if following is not None:
                    if following not in leads_to:
                        stack.append(following)
                    elif following in known:
                        borders.add(following)
            continue
        reached = 0
        for following, _ in edges:
            if following is not None:
                reached |= leads_to[following]
        leads_to[node] = reached
        if reached == PATH | WEIGHTS:
            aside = [(i, n, j) for i, (n, j) in enumerate(edges) if n is not None and leads_to[n] == WEIGHTS]
            if aside:
                joins[node] = aside
    return BackwardGraph(leads_to, joins, {n for n in borders if n.next_functions})


def walk_graph(
    graph: BackwardGraph, roots: Roots, inputs: Sequence[Tensor], *, defer: bool, retain_graph: bool
) -> tuple[list[Tensor | None], Roots, DeferredWeights | None]:
    """Goes back through a graph, but not into the graph that it enters.

    Args:
        graph: The explored part of the graph of autograd.
        roots: Where to start.
        inputs: Leaves whose gradients are wanted: those on the critical path, and the parameters if nothing is
            deferred.
        defer: Leave what only parameters wait for to :func:`walk_to_parameters`.
        retain_graph: Keep saved tensors, because another walk follows.

    Returns:
        Gradients of the inputs, gradients that arrived where another graph begins, and what was deferred.
    """
    asked = PATH if defer else PATH | WEIGHTS
    leads_to = graph.leads_to
    first = [r for r in roots if leads_to[r[0].node] & asked]
    kept: Roots = []
    recorded: dict[GraphNode, tuple[Tensor | None, ...]] = {}
    borders = [n for n in graph.entered if leads_to[n] & asked]
    with _held_back(borders, kept), _recorded(graph.joins if defer else (), recorded):
        found = gradients_of(first, inputs, retain_graph=retain_graph or defer)
    if not defer:
        return found, kept, None
    deferred = DeferredWeights(
        [r for r in roots if leads_to[r[0].node] == WEIGHTS],
        [(node, graph.joins[node], gradients) for node, gradients in recorded.items()],
        {n for n in graph.entered if leads_to[n] == WEIGHTS},
        first if any(isinstance(node, BackwardCFunction) for node in recorded) else [],
    )
    return found, kept, deferred


def walk_to_parameters(
    deferred: DeferredWeights, parameters: Sequence[Tensor], *, retain_graph: bool
) -> tuple[list[Tensor | None], Roots]:
    """Does what :func:`walk_graph` has deferred.

    Args:
        deferred: What was left; it is emptied.
        parameters: The leaves whose gradients are wanted.
        retain_graph: Keep saved tensors, because another walk follows.

    Returns:
        Gradients of the parameters, and gradients that arrived where another graph begins.
    """
    roots = deferred.roots + _join_products(deferred)
    kept = [r for r in roots if r[0].node in deferred.borders]
    roots = [r for r in roots if r[0].node not in deferred.borders]
    with _held_back(deferred.borders, kept):
        found = gradients_of(roots, parameters, retain_graph=retain_graph)
    deferred.roots, deferred.borders, deferred.alive = [], set(), []
    return found, kept


def gradients_of(
    roots: Sequence[tuple[Tensor | GradientEdge, Tensor]],
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Calls ``torch.autograd.grad``; returns None for inputs that are not reached, also if there are no roots."""
    if not roots or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [r for r, _ in roots],  # type: ignore[arg-type]
            list(inputs),
            [g for _, g in roots],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )


def _join_products(deferred: DeferredWeights) -> Roots:
    """Returns the gradients on the branches of joins."""
    found: Roots = []
    joins, deferred.joins = deferred.joins, []
    wanted = list(dict.fromkeys((n, j) for _, aside, _ in joins for _, n, j in aside))
    of_python = [join for join in joins if isinstance(join[0], BackwardCFunction)]
    others = [join for join in joins if not isinstance(join[0], BackwardCFunction)]
    del joins

    def call_joins() -> None:
        while others:
            node, aside, gradients = others.pop()
            produced = node(*gradients)  # type: ignore[operator]
            values = produced if isinstance(produced, tuple) else (produced,)
            found.extend((GradientEdge(n, j), _fitted(values[i], n, j)) for i, n, j in aside if values[i] is not None)

    if others:
        # A node asks the engine which of its outputs the running walk needs. This walk needs the edges to parameters,
        # and does nothing but call the joins, so they compute just these.
        start = torch.zeros((), device="cpu", requires_grad=True)
        with torch.enable_grad():
            inside = _Inside.apply(call_joins, start)
        torch.autograd.grad(inside, [start, *(GradientEdge(n, j) for n, j in wanted)], allow_unused=True)  # type: ignore[arg-type]
    for node, aside, gradients in of_python:
        # These cannot be called from outside. Nothing may flow on from them, or it would be counted twice.
        edges = [GradientEdge(n, j) for n, j in dict.fromkeys((n, j) for _, n, j in aside)]
        roots = [(GradientEdge(node, i), g) for i, g in enumerate(gradients) if g is not None]
        with _held_back((n for n, _ in node.next_functions if n is not None and n.next_functions), []):
            values = gradients_of(roots, edges, retain_graph=True)  # type: ignore[arg-type]
        found.extend((e, g) for e, g in zip(edges, values, strict=True) if g is not None)
    return found


class _Inside(torch.autograd.Function):
    """Calls a function in the middle of a backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[], None], start: Tensor) -> Tensor:
        ctx.function = function
        return start.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.function()
        return None, gradients[0]


def _fitted(gradient: Tensor, node: GraphNode, position: int) -> Tensor:
    """Sums over broadcast dimensions and converts, as autograd does between two nodes."""
    expected = node._input_metadata[position]
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    return gradient if gradient.dtype == expected.dtype else gradient.to(expected.dtype)


def _held_back(nodes: Iterable[GraphNode], kept: Roots) -> _Hooks:
    """Stops gradients at these nodes, and keeps them."""

    def keep(node: GraphNode) -> _Prehook:
        def hook(gradients: tuple[Tensor | None, ...]) -> tuple[None, ...]:
            kept.extend((GradientEdge(node, i), g) for i, g in enumerate(gradients) if g is not None)
            return (None,) * len(gradients)  # undefined gradients: nothing below does any work

        return hook

    return _Hooks((n, keep(n)) for n in nodes)


def _recorded(nodes: Iterable[GraphNode], into: dict[GraphNode, tuple[Tensor | None, ...]]) -> _Hooks:
    """Notes the gradients that arrive at these nodes."""

    def note(node: GraphNode) -> _Prehook:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            into[node] = gradients

        return hook

    return _Hooks((n, note(n)) for n in nodes)


class _Hooks:
    """Puts hooks on nodes for the time of a ``with`` block."""

    def __init__(self, hooks: Iterable[tuple[GraphNode, _Prehook]]) -> None:
        self._hooks = hooks

    def __enter__(self) -> None:
        self._handles = [node.register_prehook(hook) for node, hook in self._hooks]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
