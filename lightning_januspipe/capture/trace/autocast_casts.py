"""Turns the casts that autocast makes into operations of the traced graph.

``torch.export`` records the operations that a forward calls, and not the casts that autocast adds. With the casts as
nodes, a stage is a pure function under any autocast, and the types of the tensors that it sends are those of the trace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_januspipe.capture.patches import quiet_loggers
from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as

_CAST = torch.ops.aten._to_copy.default
_WRAP = torch.ops.higher_order.wrap_with_autocast
_UNKNOWN_SIZE = 7
"""An example of a size that follows from values."""


def has_casts(exported: ExportedProgram) -> bool:
    """Tells whether the traced forward switches autocast on or off."""
    graphs = (m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule))
    return any(node.target is _WRAP for graph in graphs for node in graph.nodes)


def make_casts_explicit(exported: ExportedProgram, autocast: Autocast) -> None:
    """Inserts the casts that autocast makes, and inlines the parts that the forward runs under an autocast of its own.

    Args:
        exported: a traced forward; its graph is changed. Outside autocast it then gives the results of before.
        autocast: the autocast under which it was traced.
    """
    renamed = _rewrite(exported.graph_module, autocast)
    for old, new in renamed.items():
        exported.graph_signature.replace_all_uses(old, new)


def _rewrite(module: fx.GraphModule, autocast: Autocast) -> dict[str, str]:
    """Rewrites a graph, and graphs nested in it; returns the new names of nodes that were replaced."""
    renamed: dict[str, str] = {}
    known: set[Any] = set()
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _WRAP:
            device_type, dtype, enabled, _, nested, *operands = node.args
            inner = getattr(module, nested.target)
            _rewrite(inner, autocast.changed(device_type, (dtype or _default(device_type)) if enabled else None))
            renamed.update(_take_in(module, node, inner, operands))
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            for nested in node.args:
                if isinstance(nested, fx.Node) and nested.op == "get_attr":
                    _rewrite(getattr(module, str(nested.target)), autocast)
        elif isinstance(node.target, torch._ops.OpOverload) and autocast.dtypes:
            renamed.update(_cast(module.graph, node, autocast, known))
    module.graph.eliminate_dead_code()
    module.recompile()
    # A node that replaced another one may have been replaced itself.
    return {old: renamed.get(new, new) for old, new in renamed.items()}


def _default(device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type)


def _take_in(module: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, operands: Sequence[Any]) -> dict[str, str]:
    """Replaces the node of a nested graph by the nested graph's own nodes; returns the new names of its results."""
    for source in inner.graph.nodes:
        if source.op == "get_attr":  # a graph nested in this one
            name = f"{node.name}_{source.target}"
            setattr(module, name, getattr(inner, source.target))
            source.target = name
    results = _copied_before(node, inner.graph, operands)
    renamed = {}
    for reader in list(node.users):
        value = results[reader.args[1]]
        renamed[reader.name] = value.name
        reader.replace_all_uses_with(value)
        module.graph.erase_node(reader)
    module.graph.erase_node(node)
    return renamed


def _cast(graph: fx.Graph, node: fx.Node, autocast: Autocast, known: set[Any]) -> dict[str, str]:
    """Inserts an operation's casts before it; a composite operation with casts inside is replaced by its parts.

    Args:
        graph: the graph that holds the operation.
        node: an operation of the graph.
        autocast: the autocast under which it runs.
        known: descriptions of operations without casts; gets new ones.
    """
    leaves, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    places = [i for i, x in enumerate(leaves) if isinstance(x, fx.Node)]
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in leaves]
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return {}
    key = (node.target, spec, tuple(map(_described, values)))
    if key in known:
        return {}

    def call(*given: Any) -> Any:
        filled = list(values)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        target: Any = node.target
        return target(*args, **kwargs)

    operands = [values[i] for i in places]
    with FakeTensorMode():
        examples = [_example(v) for v in operands]
    done = _operations(call, examples, autocast)
    if done == _operations(call, examples, OFF):
        known.add(key)
        return {}
    for dtype in dict.fromkeys((*(d for _, d in autocast.dtypes), torch.float32)):
        converted = [v.to(dtype) if _is_cast(v) else v for v in examples]
        if done is not None and _computing(_operations(call, converted, OFF)) == _computing(done):
            with graph.inserting_before(node):
                for place, value in zip(places, operands, strict=True):
                    if _is_cast(value) and value.dtype != dtype:
                        leaves[place] = _inserted(graph, leaves[place], dtype, value)
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            node.args, node.kwargs = tuple(args), kwargs
            return {}
    return _expand(graph, node, call, [leaves[i] for i in places], operands, autocast)


def _inserted(graph: fx.Graph, source: fx.Node, dtype: torch.dtype, value: Tensor) -> fx.Node:
    node = graph.call_function(_CAST, (source,), {"dtype": dtype})
    node.meta = {"val": value.to(dtype)}
    return node


def _expand(
    graph: fx.Graph,
    node: fx.Node,
    call: Callable[..., Any],
    sources: Sequence[fx.Node],
    operands: Sequence[Any],
    autocast: Autocast,
) -> dict[str, str]:
    with autocast_as(autocast), torch.no_grad():
        parts = make_fx(call)(*operands)
    result = _copied_before(node, parts.graph, sources)
    assert isinstance(result, fx.Node), f"{node.target} returns one tensor"
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return {node.name: result.name}


def _copied_before(node: fx.Node, inner: fx.Graph, operands: Sequence[Any]) -> Any:
    """Copies the operations of a graph before a node of another graph; returns what the copied graph returns.

    Args:
        node: the operation before which the copies go.
        inner: the graph that is copied.
        operands: the values for the inputs of the copied graph.
    """
    given, values = iter(operands), dict[fx.Node, Any]()
    with node.graph.inserting_before(node):
        for source in inner.nodes:
            if source.op == "output":
                return fx.node.map_arg(source.args[0], values.__getitem__)
            is_input = source.op == "placeholder"
            values[source] = next(given) if is_input else node.graph.node_copy(source, values.__getitem__)
    raise AssertionError("a graph without an output")


def _example(value: Any) -> Any:
    """Returns a value with the sizes of the traced call in place of symbols, which have no meaning outside a trace."""
    if isinstance(value, Tensor):
        sizes, strides = ([_example(s) for s in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if isinstance(value, (list, tuple)):
        return type(value)(_example(v) for v in value)
    if isinstance(value, torch.SymInt) and value.node.hint is None:  # it follows from values, as that of nonzero
        known, expression = value.node.shape_env.var_to_val, value.node.expr
        return int(expression.subs({s: known.get(s, _UNKNOWN_SIZE) for s in expression.free_symbols}))
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _is_cast(value: Any) -> bool:
    """Tells whether autocast may cast a value; it leaves double precision as it is."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _described(value: Any) -> Any:
    """Returns what decides on an operation's casts in an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.device.type, tuple(s if isinstance(s, int) else "" for s in value.shape)
    return "" if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else repr(value)


Operation = tuple[Any, tuple[Any, ...]]


class _OperationRecorder(TorchDispatchMode):
    """Records the operations that reach the device, with the types of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            given = pytree.tree_leaves((args, kwargs))
            self.operations.append((func, tuple(x.dtype if isinstance(x, Tensor) else str(x) for x in given)))
        return func(*args, **kwargs)


def _operations(call: Callable[..., Any], operands: Sequence[Any], autocast: Autocast) -> list[Operation] | None:
    """Returns the operations of a call on example operands; None where types do not fit."""
    with (
        autocast_as(autocast),
        torch.no_grad(),
        quiet_loggers(["torch._subclasses.fake_tensor"], logging.CRITICAL),
        _OperationRecorder() as record,
    ):
        try:
            call(*operands)
        except Exception:
            return None
    return record.operations


def _computing(operations: Sequence[Operation] | None) -> list[Operation] | None:
    """Returns the operations that compute something: neither views nor casts."""
    if operations is None:
        return None
    return [o for o in operations if o[0] is not _CAST and not o[0].is_view]
