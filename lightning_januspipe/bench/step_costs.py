"""Predicts the seconds of counted operations from the speeds of a device, declared or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor

from lightning_januspipe.bench.step_counts import Load, OperationCounter
from lightning_januspipe.experts import grouped_linear

_REPEATS = 3
_TIMED_EXPERTS = 3
_KEPT = 2**26
"""Bytes of results of a chain that is timed: more than caches hold, as in a training step."""


@dataclass(frozen=True)
class Speeds:
    """Holds the speeds of a device.

    Attributes:
        products: Additions and multiplications of products of matrices in a second.
        indexed: Numbers in a second that operations take, or add to others, by an index, beside what bytes take.
        bandwidth: Bytes in a second that operations read and write.
        launch: Seconds that each operation takes, however small it is.
    """

    products: float
    indexed: float
    bandwidth: float
    launch: float

    def seconds(self, load: Load, num_operations: float) -> tuple[float, float]:
        """Returns the seconds of products, and those of all other work of some operations."""
        others = load.indexed / self.indexed + load.bytes / self.bandwidth + num_operations * self.launch
        return load.products / self.products, others


def measured_speeds(device: torch.device, rows: int, features: int, width: int) -> Speeds:
    """Measures a device: on the CPU its processor time, on a GPU the time until it has ended.

    Each kind of operation is run in a chain, differentiated for a force, and differentiated again, as in a training
    step, and counted as a step is. What a chain does of other kinds, measured before, is subtracted from its time.

    Args:
        device: The device.
        rows: Rows of a product, and of the results of other operations, at least 8.
        features: Width of the rows before a product with an expert.
        width: The experts' inner width.
    """
    infinite = Speeds(inf, inf, inf, 0.0)
    _, launch = _remaining(_elementwise, [torch.ones(8, device=device)], 50, infinite)
    found = replace(infinite, launch=launch)
    x, values = torch.rand(rows, features, device=device), torch.rand(rows, width, device=device)
    load, seconds = _remaining(_elementwise, [values], _length(values), found)
    found = replace(found, bandwidth=load.bytes / seconds)
    index = torch.randint(rows // 8, (rows,), device=device)
    load, seconds = _remaining(partial(_indexed, index), [x], _length(x), found)
    found = replace(found, indexed=load.indexed / seconds)
    weights = [torch.rand(_TIMED_EXPERTS, *shape, device=device) for shape in ((features, width), (width, features))]
    load, seconds = _remaining(_products, [x, *weights], _length(values), found)
    return replace(found, products=load.products / seconds)


def _elementwise(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * x.sigmoid() + x


def _indexed(index: Tensor, x: Tensor) -> Tensor:
    return x[index]


def _products(x: Tensor, core: Tensor, out: Tensor) -> Tensor:
    """Multiplies rows, which have experts in no order."""
    expert = torch.arange(len(x), device=x.device) % len(core)
    return grouped_linear(grouped_linear(x, core, expert), out, expert)


def _length(result: Tensor) -> int:
    return max(_KEPT // result.nbytes, 1)


def _remaining(link: Callable[..., Tensor], inputs: Sequence[Tensor], length: int, known: Speeds) -> tuple[Load, float]:
    """Runs a chain of an operation; returns its work, and its seconds without what the known speeds explain.

    Without any speed that is known, the seconds are those of each operation.
    """

    def run() -> None:
        x, *others = (t.detach().requires_grad_() for t in inputs)
        y = x
        for _ in range(length):
            y = link(y, *others)
        (force,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(force.square().sum(), [x, *others])

    with OperationCounter(width=0) as counter:
        run()
    times = []
    for _ in range(_REPEATS):
        began = _now(inputs[0].device)
        run()
        times.append(_now(inputs[0].device) - began)
    load, seconds = sum(counter.loads.values(), Load()), min(times)
    if not known.launch:
        return load, seconds / counter.num_operations
    return load, max(seconds - sum(known.seconds(load, counter.num_operations)), seconds / 4)


def _now(device: torch.device) -> float:
    """Returns the time of this process, which other programs on the machine change little; on a GPU that of a clock."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
