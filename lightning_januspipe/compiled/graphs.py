"""Answers questions about graphs of operations: what a value needs, how large it is; and makes modules of parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled.torch_internals import expression_of, hint_of


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Returns the inputs of a graph, in order."""
    return list(graph.find_nodes(op="placeholder"))


def results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Returns the outputs of a graph, in order."""
    found: Any = graph.output_node().args[0]
    return tuple(found)


def operations(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes of a graph without inputs and output, in order."""
    return [n for n in graph.nodes if n.op not in ("placeholder", "output")]


def closure(roots: Iterable[fx.Node], stop: Collection[fx.Node] = frozenset()) -> set[fx.Node]:
    """Returns the nodes that some nodes need, these included, back to inputs and to the nodes at which to stop."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                stack.extend(node.all_input_nodes)
    return found


def sizes_of(node: fx.Node) -> list[str]:
    """Returns the sizes of a node's tensor as text: to compare symbolic sizes themselves adds guards to the graph."""
    return [expression_of(size) for size in node.meta["val"].shape]


def num_bytes(node: fx.Node) -> int:
    """Returns the bytes of a node's tensor in the example call; 0 for sizes and for several tensors."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    return torch.Size(hint_of(s) for s in value.shape).numel() * value.dtype.itemsize


def part(
    root: torch.nn.Module, nodes: Sequence[fx.Node], given: Collection[fx.Node], wanted: Sequence[fx.Node]
) -> fx.GraphModule:
    """Returns a module that computes some nodes of a graph from others.

    Args:
        root: holds the constants of the graph.
        nodes: inputs and operations of the part, in execution order.
        given: the nodes among them that become inputs, beside the inputs of the graph itself.
        wanted: the nodes that the module returns.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    # A graph has its inputs first, and a name is kept only if nothing else has taken it before.
    for node in sorted(nodes, key=lambda n: n.op != "placeholder" and n not in given):
        is_input = node.op == "placeholder" or node in given
        copies[node] = graph.placeholder(node.name) if is_input else graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    graph.output(tuple(copies[n] for n in wanted))
    return fx.GraphModule(root, graph)
