"""Answers questions about the graph of a trace while the traced forward still runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot


def depends_on(value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Tells whether a value is computed from inputs of the trace in progress, or from their sizes.

    Args:
        value: a tensor of the traced forward.
        inputs: arguments of the traced function.
    """
    start = _node_of(value)
    if start is None:  # made outside of the trace
        return False
    given = {_node_of(x) for x in inputs}
    writes = _writes(start.graph)
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in given:
            return True
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
            stack += writes.get(node, ())
    return False


def _node_of(value: Tensor) -> fx.Node | None:
    with torch._C.DisableTorchFunction():
        if isinstance(value, FunctionalTensor):
            value = value.from_functional()
        mode = get_proxy_mode()
        assert mode is not None, "no trace is in progress"
        slot: Any = get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def _writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Returns value -> operations that write to it, or to a view of it, where operations take views first."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            for value in _first_operands(node):
                found.setdefault(value, []).append(node)
    return found


def _first_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Yields the first operand of an operation, the first operand of that, and so on."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
