"""Tells whether a graph that was traced for sizes above 1 is right for sizes of 1 too."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lightning_januspipe.capture.patches import quiet_loggers
from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.sizes import compiled_expression
from lightning_januspipe.compiled.torch_internals import (
    FakeTensorMode,
    asked_for_one,
    expression_of,
    hint_of,
    plain_mode,
)


def guards_of_ones(root: fx.GraphModule, mode: FakeTensorMode) -> list[str]:
    """``graph -> the guards that sizes are not 1``, for the sizes of which its trace has asked whether they are 1.

    Operations give the same values for any layout of their operands. So the graph is right if each operation has, for a
    size of 1, a result of the shape that it was traced with: no dimension is dropped or stretched.

    Args:
        root: the graph; its placeholders and operations have their symbolic values in ``meta["val"]``.
        mode: the mode that it was traced with.
    """
    asked = asked_for_one(mode)
    if not asked:
        return []
    values = [node.meta["val"] for node in graphs.placeholders(root.graph)]
    sizes = [size for v in values for size in (v.shape if isinstance(v, Tensor) else [v])]
    example = {expression_of(size): hint_of(size) for size in sizes if isinstance(size, torch.SymInt)}
    if _has_its_shapes(root, {**example, **dict.fromkeys(asked, 1)}):
        return []
    wrong = [name for name in asked if not _has_its_shapes(root, {**example, name: 1})]
    return [f"Ne({name}, 1)" for name in wrong or asked]


def _has_its_shapes(root: fx.GraphModule, sizes: Mapping[str, int]) -> bool:
    """Returns whether all operations have results of the shapes that the graph was traced with, for some sizes."""
    values: dict[str, int] = {}

    def value(size: Any) -> int:
        text = expression_of(size)
        if text not in values:
            names, function = compiled_expression(text)
            values[text] = function(*(sizes[n] for n in names))
        return values[text]

    def shape(node: fx.Node) -> Any:
        meta = node.meta.get("val")
        return [value(s) for s in meta.shape] if isinstance(meta, Tensor) else None

    given: dict[fx.Node, Any] = {}
    with plain_mode(), quiet_loggers(["torch._subclasses.fake_tensor"], logging.CRITICAL):  # of refused operands
        for node in graphs.placeholders(root.graph):
            meta = node.meta["val"]
            is_tensor = isinstance(meta, Tensor)
            given[node] = torch.empty(shape(node), dtype=meta.dtype, device=meta.device) if is_tensor else value(meta)
        interpreter = fx.Interpreter(root)
        for node in graphs.operations(root.graph):
            interpreter.env = given
            try:
                given[node] = interpreter.run_node(node)
            except (RuntimeError, IndexError, ValueError, AssertionError):  # the operation refuses such an operand
                return False
            expected = shape(node)
            if expected is not None and list(given[node].shape) != expected:
                return False
    return True
