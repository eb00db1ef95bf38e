"""All stages of a chain in one process, one after the other: for validation, profiling and tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.memory import PhaseBytes, StorageCounter
from lightning_januspipe.engine.specs import ChainSpec, LossGradients, PhaseSeconds, StageFunction
from lightning_januspipe.engine.stage import Stage

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SingleProcessResult:
    """What one walk through the phases gave.

    Attributes:
        observables: values that the loss reads.
        derivatives: complete ∂E/∂x.
        gradients: parameter gradients.
        seconds: measured phase times of each stage.
        bytes: measured memory of each stage, if asked for. A split stage holds ``energy`` on both ranks, and
            ``force`` on that of FF.
    """

    observables: list[Tensor]
    derivatives: list[Tensor]
    gradients: GradientBuffers
    seconds: list[PhaseSeconds]
    bytes: list[PhaseBytes] | None = None


def run_single_process(
    functions: Sequence[StageFunction],
    chain: ChainSpec,
    tensors: Sequence[Any],
    loss: Callable[[list[Tensor], list[Tensor]], LossGradients],
    *,
    defer: bool = False,
    split_stages: Collection[int] = frozenset(),
    measure_memory: bool = False,
    on_phase: Callable[[str, int], None] | None = None,
) -> SingleProcessResult:
    """Walk one micro-batch through all phases of all stages.

    Args:
        functions: the stages, in order.
        chain: what they share.
        tensors: the potential call's tensors, and on a graph rank its exchanges.
        loss: called with (observables, derivatives).
        defer: leave what only parameters wait for to WF and WE.
        split_stages: indices of the stages whose FF and BF run as on another rank than FE and BE.
        measure_memory: also measure what each stage holds between its phases (times then mean little).
        on_phase: called with the name of a phase and its stage before each of them.
    """
    gradients = GradientBuffers()
    stages = [Stage(f, gradients, chain.autocast) for f in functions]
    others = {i: Stage(functions[i], gradients, chain.autocast) for i in split_stages}
    meter = _Meter(functions, gradients, others, tensors, measure_memory, on_phase)
    observables: dict[int, Tensor] = {}
    received: dict[int, list[Tensor]] = {}
    boundary: list[Tensor] = []
    for i, stage in enumerate(stages):
        received[i] = boundary
        boundary, values = meter.run("fe", i, partial(stage.forward_energy, 0, tensors), boundary)
        observables.update(zip(stage.function.observables, values, strict=True))
    known = [observables[i] for i in range(len(chain.observables))]
    boundary, derivatives = [], None
    for i, stage in reversed(list(enumerate(stages))):
        if i in others:
            meter.run("recompute", i, partial(others[i].recompute_energy, 0, tensors), received[i])
        boundary, parts = meter.run(
            "ff", i, partial(others.get(i, stage).forward_force, 0), chain.force_seeds(i, boundary)
        )
        derivatives = parts if derivatives is None else [a + b for a, b in zip(derivatives, parts, strict=True)]
    assert derivatives is not None
    seeds = loss(known, derivatives)
    boundary, more = [], {}
    for i, stage in enumerate(stages):
        given = boundary, seeds.derivatives
        if i in others:
            boundary, more[i] = meter.run("bf", i, partial(others[i].backward_force_apart, 0), *given)
        else:
            boundary = meter.run("bf", i, partial(stage.backward_force, 0, defer=defer), *given)
    boundary = []
    for i, stage in reversed(list(enumerate(stages))):
        own = [seeds.observables[k] for k in stage.function.observables]
        backward = partial(stage.backward_energy, 0, defer=defer, more=more.get(i, ()))
        boundary = meter.run("be", i, backward, chain.read_cotangents(i, boundary, seeds.observables), own)
    for i, stage in enumerate(stages if defer else ()):
        if i not in others:
            meter.run("wf", i, partial(stage.weight_force, 0))
        meter.run("we", i, partial(stage.weight_energy, 0))
    return SingleProcessResult(
        known, derivatives, gradients, meter.seconds(), meter.bytes(defer) if measure_memory else None
    )


class _Meter:
    """Runs phases, and measures their time and what is alive after them.

    To tell what a stage holds from what its messages hold, messages are copied when memory is measured.
    """

    def __init__(
        self,
        functions: Sequence[StageFunction],
        gradients: GradientBuffers,
        split_stages: Collection[int],
        tensors: Sequence[Any],
        memory: bool,
        on_phase: Callable[[str, int], None] | None,
    ) -> None:
        self._functions, self._gradients, self._split_stages, self._on_phase = (
            functions,
            gradients,
            split_stages,
            on_phase,
        )
        self._cuda = any(isinstance(t, Tensor) and t.is_cuda for t in tensors)
        self._seconds: list[dict[str, float]] = [{} for _ in functions]
        self._alive: list[dict[str, int]] = [{} for _ in functions]
        self._counters: dict[tuple[int, bool], StorageCounter] | None = {} if memory else None

    def run(
        self, phase: str, index: int, function: Callable[..., _Result], *messages: Sequence[Tensor | None]
    ) -> _Result:
        """One phase of one stage, with the messages that it receives."""
        if self._counters is None:
            return self._timed(phase, index, function, messages)
        other = index in self._split_stages and phase in ("recompute", "ff", "bf")
        counter = self._counters.setdefault((index, other), StorageCounter())
        sent = self._counted(counter, phase, index, function, messages)
        gradients = [self._gradients.get(p) for p in self._functions[index].parameters]
        self._alive[index][phase] = counter.alive(without=[g for g in gradients if g is not None])
        return sent

    def seconds(self) -> list[PhaseSeconds]:
        """Times of each stage."""
        return [PhaseSeconds(**s) for s in self._seconds]

    def bytes(self, defer: bool) -> list[PhaseBytes]:
        """Memory of each stage."""
        found = []
        for index, alive in enumerate(self._alive):
            energy = alive["fe"]
            force = alive["ff"] - alive.get("recompute", energy)
            later = [alive["be"] - energy]
            if index not in self._split_stages:
                waiting = force if defer else 0  # for WF
                later = [alive["bf"] - energy - waiting, alive["be"] - energy - waiting, alive.get("wf", 0) - energy]
            found.append(PhaseBytes(energy, max(force, 0), max(*later, 0)))
        return found

    def _counted(
        self,
        counter: StorageCounter,
        phase: str,
        index: int,
        function: Callable[..., _Result],
        messages: Sequence[Sequence[Tensor | None]],
    ) -> _Result:
        received = _copied(messages)
        counter.note(t for t in pytree.tree_leaves(received) if t is not None)
        with counter:
            result = self._timed(phase, index, function, received)
        return _copied(result)

    def _timed(
        self, phase: str, index: int, function: Callable[..., _Result], messages: Sequence[Sequence[Tensor | None]]
    ) -> _Result:
        if self._on_phase is not None:
            self._on_phase(phase, index)
        self._synchronize()
        began = time.perf_counter()
        result = function(*messages)
        self._synchronize()
        name = "ff" if phase == "recompute" else phase
        spent = self._seconds[index]
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return result

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _copied(tensors: _Result) -> _Result:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tensors)
