"""Runs all stages of a chain in one process, one after the other: for validation, profiling and tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_januspipe.engine.clock import clock
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.memory import StorageCounter
from lightning_januspipe.engine.messages import Parts
from lightning_januspipe.engine.phases import Passed, StepPhases
from lightning_januspipe.engine.specs import ChainSpec, LossGradients, MicrobatchInput, StageFunction
from lightning_januspipe.engine.stage import SplitStage, Stage
from lightning_januspipe.schedule import Action, MemoryCosts, Phase, PhaseCosts
from lightning_januspipe.schedule.actions import COMPUTED_PHASES

_Result = TypeVar("_Result")

StageFactory = Callable[[StageFunction, GradientBuffers, ChainSpec], Stage]
"""Makes what runs the phases of a stage."""

SHORTEST = 1e-7
"""Seconds: phases too short to be measured get the least that counts."""

_OWN_SUCCESSOR = {Phase.FE: Phase.FF, Phase.BF: Phase.BE}
"""The phases that hand something on to another phase of the same stage, and that phase."""


@dataclass(frozen=True)
class SingleProcessResult:
    """Holds the results of one micro-batch, and the costs of its phases.

    Attributes:
        observables: Values that the loss reads.
        derivatives: Complete ∂E/∂x.
        gradients: Parameter gradients.
        costs: Measured seconds of the phases of each stage. FF of a split stage counts FE's recomputation, and BF the
            way back through it.
        memory: Measured bytes of each stage on the device, if asked for. Values received count; parameters, their
            gradients, the batch's own tensors and messages in transit do not. A split stage holds ``energy`` on both
            ranks, and ``force`` on the rank of FF.
        host_bytes: The most bytes that each stage keeps on the host, measured with ``memory``.
    """

    observables: list[Tensor]
    derivatives: list[Tensor]
    gradients: GradientBuffers
    costs: list[PhaseCosts]
    memory: list[MemoryCosts] | None = None
    host_bytes: list[int] | None = None


def run_single_process(
    functions: Sequence[StageFunction],
    chain: ChainSpec,
    tensors: Sequence[Any],
    loss: Callable[[list[Tensor], list[Tensor]], LossGradients],
    *,
    defer: bool = False,
    split_stages: Collection[int] = frozenset(),
    measure_memory: bool = False,
    on_action: Callable[[Action], None] | None = None,
    make_stage: StageFactory | None = None,
    gradients: GradientBuffers | None = None,
) -> SingleProcessResult:
    """Runs all phases of all stages for one micro-batch.

    Args:
        functions: The stages, in order.
        chain: What they share.
        tensors: The potential call's tensors, and on a graph rank its exchanges.
        loss: Called with (observables, derivatives).
        defer: Leave what only parameters wait for to WF and WE.
        split_stages: Indices of the stages whose FF and BF run as on another rank than FE and BE.
        measure_memory: Also measure what each stage holds between its phases (times then mean little).
        on_action: Called before each action.
        make_stage: Makes what runs the phases of stages that are not split; None for stages that run eagerly.
        gradients: Sums parameter gradients; None for new sums of all.
    """
    gradients = GradientBuffers() if gradients is None else gradients
    stages = {
        i: SplitStage(function, gradients, chain.autocast)
        if i in split_stages
        else (make_stage or eager_stage)(function, gradients, chain)
        for i, function in enumerate(functions)
    }
    results: list[list[Tensor]] = []

    def kept_loss(_: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        results.extend((observables, derivatives))
        return loss(observables, derivatives)

    actions = _one_microbatch(len(functions), defer, split_stages)
    phases = _MeasuredPhases(stages, chain, tensors, actions, kept_loss, gradients, measure_memory)
    chain_parts: Parts[Tensor] = Parts()
    own_parts: dict[tuple[Phase, int], Parts[Tensor]] = {}
    before: Phase | None = None
    for action in actions:
        if on_action is not None:
            on_action(action)
        if action == (Phase.BF, 0, 0):
            phases.loss_gradients(0)  # before the phase, whose time does not count it
        chain_parts = chain_parts if action.phase is before else Parts()
        made = phases.run(action, Passed(chain_parts, own_parts.pop((action.phase, action.stage), Parts())))
        chain_parts, before = made.chain, action.phase
        if action.phase in _OWN_SUCCESSOR:
            own_parts[_OWN_SUCCESSOR[action.phase], action.stage] = made.own
    observables, derivatives = results
    memory = phases.memory(split_stages) if measure_memory else None
    host = phases.host_bytes() if measure_memory else None
    return SingleProcessResult(observables, derivatives, gradients, phases.costs(), memory, host)


def eager_stage(function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
    """Returns a stage whose phases run operation by operation."""
    return Stage(function, gradients, chain.autocast)


def _one_microbatch(num_stages: int, defer: bool, split_stages: Collection[int]) -> list[Action]:
    """Returns the actions of a micro-batch in the order of the chain; a split stage defers nothing of BF."""
    found = []
    for phase in (Phase.FE, Phase.FF, Phase.BF, Phase.BE):
        order = range(num_stages) if phase in (Phase.FE, Phase.BF) else reversed(range(num_stages))
        found += [Action(phase, stage, 0) for stage in order]
    for stage in range(num_stages) if defer else ():
        found += [Action(Phase.WF, stage, 0)] * (stage not in split_stages) + [Action(Phase.WE, stage, 0)]
    return found


class _MeasuredPhases(StepPhases):
    """Measures the time of phases, and what is alive after them.

    To tell what a stage holds from what its messages hold, messages are copied when memory is measured. What a stage
    keeps on the host is moved inside of the phases: then their times are at most too long.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        chain: ChainSpec,
        tensors: Sequence[Any],
        actions: Sequence[Action],
        loss: Callable[[int, list[Tensor], list[Tensor]], LossGradients],
        gradients: GradientBuffers,
        measure_memory: bool,
    ) -> None:
        super().__init__(stages, chain, len(stages), [MicrobatchInput(list(tensors), {})], actions, loss)
        self._gradients = gradients
        self._is_cuda = any(isinstance(t, Tensor) and t.is_cuda for t in tensors)
        self._spent: dict[tuple[int, Phase], float] = {}
        self._alive: dict[tuple[int, Phase], list[int]] = {}
        self._most_on_host = dict.fromkeys(stages, 0)
        self._counters: dict[tuple[int, bool], StorageCounter] | None = {} if measure_memory else None

    def costs(self) -> list[PhaseCosts]:
        """Returns the seconds of the phases of each stage."""

        def spent(stage: int, phase: Phase) -> float:
            return max(self._spent.get((stage, phase), 0.0), 0.0 if phase in (Phase.WF, Phase.WE) else SHORTEST)

        return [PhaseCosts(*(spent(stage, phase) for phase in COMPUTED_PHASES)) for stage in self._stages]

    def host_bytes(self) -> list[int]:
        """Returns the most bytes that each stage has kept on the host."""
        return list(self._most_on_host.values())

    def _fetch_ahead(self, action: Action) -> None:
        """Does nothing: each phase fetches for itself."""

    def _to_host(self, action: Action) -> None:
        """Does nothing: values move before the time of a phase ends."""

    def memory(self, split_stages: Collection[int]) -> list[MemoryCosts]:
        """Returns the bytes that a micro-batch holds in each stage."""
        found = []
        for stage in self._stages:
            energy, force_calls = self._alive[stage, Phase.FE][-1], self._alive[stage, Phase.FF]
            force = force_calls[-1] - force_calls[0]
            after_be = self._alive[stage, Phase.BE][-1] - energy
            if stage in split_stages:
                kept = after_be
            else:
                waiting = force if self._is_deferred else 0  # for WF
                after_wf = self._alive.get((stage, Phase.WF), [0])[-1] - energy
                kept = max(self._alive[stage, Phase.BF][-1] - energy - waiting, after_be - waiting, after_wf)
            found.append(MemoryCosts(energy, max(force, 0), max(kept, 0)))
        return found

    def _call(self, action: Action, function: Callable[..., _Result], *messages: Sequence[Tensor | None]) -> _Result:
        if self._counters is None:
            return self._timed(action, function, messages)
        stage = self._stages[action.stage]
        is_other_rank = isinstance(stage, SplitStage) and action.phase in (Phase.FF, Phase.BF)
        counter = self._counters.setdefault((action.stage, is_other_rank), StorageCounter())
        result = self._counted(counter, action, function, messages)
        gradients = [self._gradients.get(p) for p in stage.function.parameters]
        on_host = stage.host_tensors()
        self._most_on_host[action.stage] = max(self._most_on_host[action.stage], sum(t.nbytes for t in on_host))
        alive = counter.alive(without=[*on_host, *(g for g in gradients if g is not None)])
        self._alive.setdefault((action.stage, action.phase), []).append(alive)
        return result

    def _counted(
        self,
        counter: StorageCounter,
        action: Action,
        function: Callable[..., _Result],
        messages: Sequence[Sequence[Tensor | None]],
    ) -> _Result:
        received = _copied(messages)
        counter.note(t for t in pytree.tree_leaves(received) if t is not None)
        with counter:
            result = self._timed(action, function, received)
        return _copied(result)

    def _timed(
        self, action: Action, function: Callable[..., _Result], messages: Sequence[Sequence[Tensor | None]]
    ) -> _Result:
        self._synchronize()
        stage, began = self._stages[action.stage], clock()
        stage.fetch(action.microbatch, action.phase)
        result = function(*messages)
        stage.to_host(action.microbatch, None)
        self._synchronize()
        key = action.stage, action.phase
        self._spent[key] = self._spent.get(key, 0.0) + clock() - began
        return result

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def _copied(tensors: _Result) -> _Result:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tensors)
