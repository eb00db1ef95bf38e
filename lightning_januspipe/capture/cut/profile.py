"""Measures the time of every operation of a captured program, and the size of its value, on one example batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.cut.cut import Profile, Regions
from lightning_januspipe.capture.trace.function import PlaceholderValues, new_leaf
from lightning_januspipe.capture.trace.operators import target_function
from lightning_januspipe.capture.trace.program import Program, replace_refs
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.clock import clock

# At least so many runs, and more while there is time: on a busy machine the least time of a few runs says little.
_LEAST_REPEATS, _MOST_REPEATS = 3, 20
_SECONDS = 1.0  # after which no more is measured


def measure(
    program: Program, regions: Regions, potential: nn.Module, tensors: Sequence[Tensor], repeats: int | None = None
) -> Profile:
    """``Program, Regions, tensors -> Profile``: measures every operation of body and geometry.

    Args:
        program: the captured program.
        regions: its classification.
        potential: the live potential, for parameters and buffers.
        tensors: the call's tensors.
        repeats: how many runs of the forward pass count, after a first run that warms up; None for as many as time
            allows. The least time of an operation counts.
    """
    wanted = {*regions.body, *regions.geometry}
    nodes = [n for n in program.nodes if n.name in wanted]
    functions = [target_function(n.target) for n in nodes]
    coordinates = set(program.coordinates)
    names = [n.name for n in program.nodes if n.is_placeholder]
    start_values = dict(zip(names, PlaceholderValues(program, potential, names).values(tensors), strict=True))
    on_cuda = any(t.is_cuda for t in tensors)
    seconds: dict[str, float] = {}
    num_bytes: dict[str, int] = {}
    sizes: dict[str, int] = {}
    started = time.perf_counter()
    for repeat in range((repeats or _MOST_REPEATS) + 1):
        if repeats is None and repeat > _LEAST_REPEATS and time.perf_counter() - started > _SECONDS:
            break
        values = {k: new_leaf(v) if k in coordinates else v for k, v in start_values.items()}
        with torch.enable_grad(), autocast_as(OFF):
            for node, function in zip(nodes, functions, strict=True):
                args = replace_refs(node.args, values.__getitem__)
                kwargs = replace_refs(node.kwargs, values.__getitem__)
                began = clock()
                value = function(*args, **kwargs)
                if on_cuda:
                    torch.cuda.synchronize()
                spent = clock() - began
                if node.name in coordinates and isinstance(value, Tensor) and not value.requires_grad:
                    value = new_leaf(value)
                values[node.name] = value
                if repeat:
                    seconds[node.name] = min(seconds.get(node.name, spent), spent)
                if isinstance(value, Tensor):
                    num_bytes[node.name] = value.numel() * value.element_size()
        sizes = _sizes(program, values)
        # The graph of autograd is freed with the last value, and not in the time of the next run's first operation.
        values.clear()
        value = None
    return Profile(seconds, num_bytes, sizes)


def _sizes(program: Program, values: Mapping[str, object]) -> dict[str, int]:
    """Returns the values of the size expressions in the shapes of some values."""
    found: dict[str, int] = {}
    for name, value in values.items():
        spec = program.by_name[name].spec
        if spec is not None and isinstance(value, Tensor) and value.dim() == len(spec.shape):
            found.update({s: size for s, size in zip(spec.shape, value.shape, strict=True) if isinstance(s, str)})
    return found
