"""All stages of a chain in one process, one after the other: for validation, profiling and tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_januspipe.engine.executor import LossGradients
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage


@dataclass(frozen=True)
class PhaseSeconds:
    """Measured seconds of the four phases of one stage for one micro-batch."""

    fe: float
    ff: float
    bf: float
    be: float

    @property
    def total(self) -> float:
        """All four phases."""
        return self.fe + self.ff + self.bf + self.be


@dataclass(frozen=True)
class LocalResult:
    """What one walk through the four phases gave.

    Attributes:
        observables: values that the loss reads.
        derivatives: complete ∂E/∂x.
        gradients: parameter gradients.
        seconds: measured phase times of each stage.
    """

    observables: list[Tensor]
    derivatives: list[Tensor]
    gradients: GradientBuffers
    seconds: list[PhaseSeconds]


def run_local(
    functions: Sequence[StageFunction],
    chain: ChainSpec,
    tensors: Sequence[Tensor],
    loss: Callable[[list[Tensor], list[Tensor]], LossGradients],
) -> LocalResult:
    """Walk one micro-batch through FE, FF, BF and BE of all stages.

    Args:
        functions: the stages, in order.
        chain: what they share.
        tensors: the potential call's tensors.
        loss: called with (observables, derivatives).
    """
    gradients = GradientBuffers()
    stages = [Stage(f, gradients) for f in functions]
    clock = _Clock(len(stages), tensors)
    observables: dict[int, Tensor] = {}
    boundary: list[Tensor] = []
    for i, stage in enumerate(stages):
        with clock.phase("fe", i):
            boundary, values = stage.forward_energy(0, tensors, boundary)
        observables.update(zip(stage.function.observables, values, strict=True))
    known = [observables[i] for i in range(len(chain.observables))]
    boundary, derivatives = [], None
    for i, stage in reversed(list(enumerate(stages))):
        with clock.phase("ff", i):
            boundary, parts = stage.forward_force(0, boundary)
        derivatives = parts if derivatives is None else [a + b for a, b in zip(derivatives, parts, strict=True)]
    assert derivatives is not None
    seeds = loss(known, derivatives)
    boundary = []
    for i, stage in enumerate(stages):
        with clock.phase("bf", i):
            boundary = stage.backward_force(0, boundary, seeds.derivatives)
    boundary = []
    for i, stage in reversed(list(enumerate(stages))):
        with clock.phase("be", i):
            own = [seeds.observables[k] for k in stage.function.observables]
            boundary = stage.backward_energy(0, boundary, own)
    return LocalResult(known, derivatives, gradients, clock.seconds())


class _Clock:
    def __init__(self, num_stages: int, tensors: Sequence[Tensor]) -> None:
        self._cuda = any(t.is_cuda for t in tensors)
        self._spent = [dict.fromkeys(("fe", "ff", "bf", "be"), 0.0) for _ in range(num_stages)]

    def phase(self, name: str, stage: int) -> _Timed:
        return _Timed(self._spent[stage], name, self._cuda)

    def seconds(self) -> list[PhaseSeconds]:
        return [PhaseSeconds(**s) for s in self._spent]


class _Timed:
    def __init__(self, spent: dict[str, float], name: str, cuda: bool) -> None:
        self._spent, self._name, self._cuda = spent, name, cuda

    def __enter__(self) -> None:
        self._synchronize()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        self._spent[self._name] += time.perf_counter() - self._began

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
