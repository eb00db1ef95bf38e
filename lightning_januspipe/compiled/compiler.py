"""Makes stages that run compiled phases: traces, cuts and compiles the stages of one rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx

from lightning_januspipe.capture.stages.stage_body import StageBody
from lightning_januspipe.compiled import torch_internals
from lightning_januspipe.compiled.artifacts import ArtifactCache, StageArtifacts, StageSource
from lightning_januspipe.compiled.blueprint import TraceableStage, blueprint, is_traceable
from lightning_januspipe.compiled.compiled_stage import CompiledStage, PhaseRunners
from lightning_januspipe.compiled.exchanges import exchange_order, first_difference
from lightning_januspipe.compiled.joint import Joint, trace_joint
from lightning_januspipe.compiled.minimum_cut import Activation
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, StagePhases, phase_graphs
from lightning_januspipe.engine.eager_stages import eager_stages
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.errors import CaptureError, in_one_line
from lightning_januspipe.schedule.costs import format_bytes


def compile_graph(graph: fx.GraphModule, mode: torch_internals.FakeTensorMode) -> Callable[..., Sequence[Tensor]]:
    """Returns the graph of one phase as a compiled function."""
    return torch_internals.compiled(graph, mode)


def artifact_cache(folder: Path | None) -> ArtifactCache:
    """Returns the cache of compiled phases in a folder; None for no cache."""
    return ArtifactCache(folder)


def require_compiler(device: str) -> None:
    """Raises an error if nothing can compile for a type of device.

    Args:
        device: the type, such as ``"cpu"``.

    Raises:
        ValueError: the compiler is missing.
    """
    missing = torch_internals.missing_compiler(device)
    if missing is not None:
        raise ValueError(f"compile=True, but {missing}. Or train with compile=False.")


@dataclass(frozen=True)
class CompileReport:
    """Says what one rank has compiled.

    Attributes:
        num_compiled: stages that run compiled phases.
        seconds: how long tracing and compiling took.
        cpu_seconds: CPU time of that, with the processes of the compiler.
        eager: in words, stage by stage, what runs eagerly, and why.
    """

    num_compiled: int
    seconds: float
    cpu_seconds: float
    eager: tuple[str, ...]


@dataclass(frozen=True)
class _Compiled:
    """Says how a rank has compiled a stage.

    Attributes:
        refused: why it runs eagerly; empty where it is compiled.
        order: the exchanges of each phase; see :func:`~.exchanges.exchange_order`.
    """

    refused: str
    order: Mapping[str, list[str]]


@dataclass
class StageCompiler:
    """Makes the stages of one rank (a :data:`~lightning_januspipe.engine.single_process.StageFactory`).

    A stage that cannot be compiled runs eagerly, on all of its graph ranks if one of them cannot. Compiled phases are
    kept, so that a later pipeline of the same capture compiles nothing.

    Attributes:
        sizes: the values of all size symbols in two example calls, the usual one first.
        device: type of the device that the stages run on.
        activation: what phases keep for later ones.
        activations: the same for each stage, where stages differ.
        defer: leave what only parameters wait for to WF and WE.
        trains: also compile BF and BE.
        tolerance: what rounding explains of a difference from the eager phases, relative to the scale of a value.
        cache: the folder in which inductor keeps what it compiles; None for inductor's own.
        artifacts: the folder of compiled phases; None to keep none.
        uncompiled: why another process could not compile a stage, by the key of its source.
        compiles: compile in this process what neither the cache nor another process could give.
        most_bytes: the most bytes that a micro-batch may keep between the phases of each stage; empty for no limit.
        over_ranks: returns an object of every graph rank of this rank's stages, on all of them.
        interprets: run the graphs operation by operation instead of compiling them, to measure what they keep.
        joints: the joint graphs of the stages, which several compilers of the same stages may share.
        sources: what each stage is made from, and the keys.
        compiled: the compiled stages, by index.
        refused: for each stage that runs eagerly the reason.
        seconds: how long tracing and compiling took.
        cpu_seconds: CPU time of that, with the processes of the compiler.
    """

    sizes: tuple[Mapping[str, int], Mapping[str, int]]
    device: str
    activation: Activation = "pointwise"
    activations: tuple[Activation, ...] = ()
    defer: bool = False
    trains: bool = True
    tolerance: float | None = None
    cache: Path | None = None
    artifacts: Path | None = None
    uncompiled: Mapping[str, str] = field(default_factory=dict)
    compiles: bool = True
    most_bytes: tuple[float, ...] = ()
    over_ranks: Callable[[_Compiled], list[_Compiled]] = lambda mine: [mine]
    interprets: bool = False
    joints: dict[int, Joint] = field(default_factory=dict)
    sources: dict[int, tuple[StageSource, str | None]] = field(default_factory=dict)
    compiled: dict[int, PhaseRunners] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __call__(self, function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
        """Returns a stage that runs compiled phases, or one that runs eagerly."""
        return self._stage(function, gradients, chain, compares=True)

    def uncompared(self, function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
        """Returns the same, but its first micro-batch is not compared with eager phases, to measure its times."""
        return self._stage(function, gradients, chain, compares=False)

    def _stage(self, function: StageFunction, gradients: GradientBuffers, chain: ChainSpec, *, compares: bool) -> Stage:
        index = function.index
        if index not in self.compiled and index not in self.refused:
            began, cpu_began = time.perf_counter(), sum(os.times()[:4])
            self._compile(function, chain)
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += sum(os.times()[:4]) - cpu_began
        if index in self.refused:
            return eager_stages(self.activation_of(index))(function, gradients, chain)
        runnable = self.compiled[index] if compares else replace(self.compiled[index], tolerance=None)
        return CompiledStage(cast(TraceableStage, function), runnable, gradients, chain)

    def activation_of(self, index: int) -> Activation:
        """Returns what the phases of a stage keep."""
        return self.activations[index] if self.activations else self.activation

    def report(self) -> CompileReport:
        """Returns what was compiled on this rank."""
        eager = [f"stage {index} runs eagerly: {reason}" for index, reason in sorted(self.refused.items())]
        return CompileReport(len(self.compiled), self.seconds, self.cpu_seconds, tuple(eager))

    def _compile(self, function: StageFunction, chain: ChainSpec) -> None:
        """Compiles a stage, on all of its graph ranks or on none.

        Raises:
            CaptureError: the graph ranks have other exchanges, or another order of them.
        """
        index = function.index
        order: Mapping[str, list[str]] = {}
        reason = "" if is_traceable(function) else "it runs parts of the model on graph ranks, which are not traced"
        if not reason:
            try:
                self.compiled[index], order = self._runners(cast(TraceableStage, function), chain)
            except Exception as error:  # torch's tracing and compiling may fail in any way
                reason = in_one_line(error)
        of_ranks = self.over_ranks(_Compiled(reason, order))
        found = [f"on graph rank {r}, {c.refused}" for r, c in enumerate(of_ranks) if c.refused]
        if reason or found:
            self.compiled.pop(index, None)
            self.refused[index] = reason or found[0]
            return
        difference = first_difference([c.order for c in of_ranks])
        if difference is not None:
            raise CaptureError(
                f"stage {index}, compiled, exchanges rows between graph ranks in another order on each of them: "
                f"{difference}. Run the same versions of torch and of the model on all ranks, or use compile=False."
            )

    def source(self, function: TraceableStage, chain: ChainSpec) -> tuple[StageSource, str | None]:
        """Returns the source of a stage and its key in the cache; later calls return the same.

        Args:
            function: the stage.
            chain: what all stages share.
        """
        if function.index not in self.sources:
            source = self._source(function, chain)
            self.sources[function.index] = source, source.key()
        return self.sources[function.index]

    def require_own_work(self, key: str | None) -> None:
        """Raises an error if this process may not compile a stage itself.

        Raises:
            CaptureError: with the reason of the other process, if it has told one.
        """
        if not self.compiles:
            raise CaptureError(self.uncompiled.get(key or "", "its compiled phases are missing in the cache"))

    def kept(self, source: StageSource, key: str | None) -> StageArtifacts | None:
        """Returns the compiled phases of a stage from the cache; None where there are none that are right for it."""
        found = None if key is None else artifact_cache(self.artifacts).load(key)
        return found if found is None or found.phases.sizes.misfit(source.plan.example) is None else None

    def _source(self, function: TraceableStage, chain: ChainSpec) -> StageSource:
        with torch.inference_mode(False):  # evaluation has it on, and then nothing could be differentiated
            plan = blueprint(function, chain, *self.sizes, self.device)
        activation, defer = self.activation_of(function.index), self.defer and self.trains
        return StageSource(plan, activation, defer, self.trains, torch_internals.Settings.current(self.device))

    def _runners(self, function: TraceableStage, chain: ChainSpec) -> tuple[PhaseRunners, Mapping[str, list[str]]]:
        """Returns the compiled phases of a stage, and its exchanges in their order."""
        if self.interprets:
            source = self._source(function, chain)
            self.joints[function.index] = joint = self.joints.get(function.index) or traced(source)
            graphs = phase_graphs(joint, source.activation, source.defer)
            return PhaseRunners(graphs.phases, graphs.modules), exchange_order(graphs.modules)
        source, key = self.source(function, chain)
        with torch_internals.inductor_cache(self.cache):
            kept = self.kept(source, key)
            if kept is not None:
                self._require_bytes(function.index, kept.phases)
                return kept.runners(self.tolerance), kept.order
            self.require_own_work(key)
            graphs = phase_graphs(traced(source), source.activation, source.defer)
            order = exchange_order(graphs.modules)
            runners = {phase: compile_graph(graph, graphs.mode) for phase, graph in graphs.modules.items()}
        phases = with_recorded_guards(graphs)
        require_fit(phases, source)
        self._require_bytes(function.index, phases)
        functions = {phase: torch_internals.packed(runner) for phase, runner in runners.items()}
        complete = {phase: function for phase, function in functions.items() if function is not None}
        if key is not None and len(complete) == len(functions):
            artifact_cache(self.artifacts).save(key, StageArtifacts(phases, order, complete))
        return PhaseRunners(phases, runners, self.tolerance), order

    def _require_bytes(self, index: int, phases: StagePhases) -> None:
        if self.most_bytes:
            held = max(phases.held_bytes(phase) for phase in phases.signatures)
            if held > self.most_bytes[index]:
                raise CaptureError(
                    f"its compiled phases would keep {format_bytes(held)} of a micro-batch, more than the "
                    f"{format_bytes(self.most_bytes[index])} that the memory limit has room for"
                )


def traced(source: StageSource) -> Joint:
    """Returns the joint graph of a stage."""
    with torch.inference_mode(False):
        try:
            return trace_joint(source.plan, trains=source.trains)
        except ValueError as error:
            # Graphs get contiguous tensors, of which the forward's views may not be possible.
            if "Cannot view" not in str(error) or not isinstance(source.plan.body, StageBody):
                raise
        return trace_joint(replace(source.plan, body=source.plan.body.with_copies()), trains=source.trains)


def require_fit(phases: StagePhases, source: StageSource) -> None:
    """Raises an error if the phases are not right for the example batch, or their guards cannot be evaluated.

    Raises:
        CaptureError: they are not.
    """
    misfit = phases.sizes.misfit(source.plan.example)
    if misfit is not None:
        raise CaptureError(f"the compiled phases are not right for the example batch: {misfit}")


def with_recorded_guards(graphs: PhaseGraphs) -> StagePhases:
    """Returns the phases of a stage with the guards on sizes that compiling has added."""
    phases = graphs.phases
    return replace(phases, sizes=phases.sizes.with_guards(torch_internals.size_guards(graphs.mode)))
