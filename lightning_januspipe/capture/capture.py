"""Turns a LightningModule and a few samples into a potential in stages, validated against the module itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from lightning_januspipe.capture.activations import (
    ActivationCosts,
    ActivationFactories,
    measure_activations,
    run_of_call,
)
from lightning_januspipe.capture.adapters import adapted, adapters_of, capturing
from lightning_januspipe.capture.balance import StepTime, balance_parts, balance_stages, fastest, measure_for_compiling
from lightning_januspipe.capture.cache.key import ProgramKey, program_key
from lightning_januspipe.capture.cache.store import ProgramCache
from lightning_januspipe.capture.cut.compiled_work import with_compiled_work
from lightning_januspipe.capture.cut.cut import Cut, find_cut, find_regions
from lightning_januspipe.capture.cut.profile import measure
from lightning_januspipe.capture.find.call_format import CallFormat
from lightning_januspipe.capture.find.find_potential import evaluation_call, find_potential
from lightning_januspipe.capture.find.grad_call import PotentialCall, StepFunction, call_arguments
from lightning_januspipe.capture.find.in_step import potential_of
from lightning_januspipe.capture.passes import apply_passes
from lightning_januspipe.capture.report import summary
from lightning_januspipe.capture.side_effects import unchanged
from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.explicit import ExplicitStages
from lightning_januspipe.capture.stages.explicit_shapes import explicit_potential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trace.program import Program
from lightning_januspipe.capture.trace.trace import trace_potential
from lightning_januspipe.capture.validate.against_eager import (
    DEFAULT_MODE,
    PhaseMode,
    run_staged,
    validate_evaluation,
    validate_stages,
)
from lightning_januspipe.errors import CaptureError, quoted
from lightning_januspipe.random_state import seeded
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts

StageOrigin = Literal["auto", "captured", "explicit"]
"""Where stages come from: tracing, the potential itself, or the first of the two that works."""


@dataclass(frozen=True)
class Capture:
    """Holds a potential in stages, with its measurements.

    Attributes:
        potential: its stages.
        seconds: measured phase times of each stage.
        bytes: measured memory of one micro-batch in each stage.
        elapsed: seconds that finding, tracing, cutting and validating took.
        origin: in words, where the stages come from, and what was refused before.
        sizes: values of the size symbols in the call that the stages were measured on, and in the call that was traced.
        alternative: in words, what to try where these stages cannot be sharded; empty where there is nothing else.
        activations: what the stages take with each activation that was asked for, the fastest first.
        not_evaluated: in words, why the stages cannot evaluate; empty where they can.
    """

    potential: StagedPotential
    costs: list[PhaseCosts]
    memory: list[MemoryCosts]
    elapsed: float
    origin: str
    sizes: tuple[dict[str, int], dict[str, int]]
    alternative: str = ""
    activations: dict[str, ActivationCosts] = field(default_factory=dict)
    not_evaluated: str = ""

    def describe(self, num_ranks: int | None = None) -> str:
        """Returns one line for a user: which potential was found, and how it is cut.

        Args:
            num_ranks: number of ranks that share the stages; it is told where it is not the number of stages.
        """
        total = sum(s.total for s in self.costs)
        shares = " + ".join(f"{100 * s.total / total:.0f} %" for s in self.costs)
        num_stages = len(self.costs)
        ranks = f" on {num_ranks} rank{'s' if num_ranks != 1 else ''}" if num_ranks not in (None, num_stages) else ""
        stages = f"{num_stages} stages{ranks} with {shares} of the work, {summary(self.potential)}"
        is_plain = self.origin.startswith("captured (") and "; " not in self.origin
        return (
            f"potential {quoted(self.potential.path)}{'' if is_plain else f' {self.origin}:'} in "
            f"{stages if num_stages > 1 else 'one stage'}"
        )

    def describe_capture(self) -> str:
        """Returns one line for a developer: where the stages come from, and how long that took."""
        operations = f"{sum(self.potential.num_operations)} {self.potential.operation_word}"
        ready = f"ready after {self.elapsed:.1f} s"
        return f"potential {quoted(self.potential.path)} {self.origin}: {operations}, {ready}"


def capture_module(
    module: nn.Module,
    step: StepFunction,
    traced_batch: Any,
    other_batch: Any,
    placements: Sequence[Sequence[int]],
    potential: str | None = None,
    *,
    phase_mode: PhaseMode = DEFAULT_MODE,
    step_time: StepTime | None = None,
    evaluation_step: StepFunction | None = None,
    stages: StageOrigin = "auto",
    cache: ProgramCache | None = None,
    activations: ActivationFactories | None = None,
    graph_size: int = 1,
    compiles: bool = False,
) -> Capture:
    """Finds the potential of a module, cuts it into stages, and validates them.

    Args:
        module: the LightningModule, left as it was.
        step: its training (or evaluation) step, from a batch to what it returns.
        traced_batch: a batch of at least two structures, on which the potential is traced.
        other_batch: a batch about as large as a micro-batch, with other numbers of atoms, edges and structures: the
            potential is validated and measured on it.
        placements: for each possible number of stages the rank of each stage. The placement with the shortest step is
            taken; placements after the first are left out where the potential has too few cuttable parts.
        potential: dotted name of the potential, where the user gave one.
        phase_mode: how the phases will be run.
        step_time: from the measured phases of each stage to the time of a training step; needed for several placements.
        evaluation_step: the step that Lightning runs for validation during training.
        stages: where the stages come from; "auto" tries to trace the potential, and then takes the potential's own.
        cache: a cache of traced potentials; None to trace always.
        activations: activations to measure too.
        graph_size: number of graph ranks that will share the atoms of each micro-batch.
        compiles: whether phases will be compiled: a trace is then cut by estimates of the work that these do.

    Raises:
        CaptureError: the potential cannot be found, traced, cut or validated; the message says what to change.
    """
    began = time.perf_counter()
    with unchanged(module), capturing(module):
        found = find_potential(module, step, traced_batch, potential, graph_size)
        args, kwargs = call_arguments(module, found.path, step, other_batch, found.replaced is not None)
        job = _CaptureJob(
            potential_of(module, step, found),
            found,
            replace(found, args=args, kwargs=kwargs),
            placements,
            phase_mode,
            step_time,
            cache,
            graph_size,
            compiles,
        )
        captured, seconds, origin, alternative = _stages(job, stages)
        if phase_mode.split_stages or phase_mode.gradient_bytes is not None:
            validate_stages(captured, job.potential, job.other, phase_mode)
        captured = captured.with_validated((job.potential, job.other))
        not_evaluated = ""
        try:
            evaluated = potential_of(module, evaluation_step or step, found)
            evaluation = evaluation_call(module, evaluation_step or step, job.other, other_batch)
            evaluating = captured.with_evaluation(evaluated, evaluation)
            validate_evaluation(evaluating, evaluated, evaluation)
            captured = evaluating.with_validated((evaluated, evaluation))
        except CaptureError as error:
            if evaluation_step is None or phase_mode.gradient_bytes is not None:
                raise
            not_evaluated = str(error)
        folded = replace(phase_mode, split_stages=False)
        memory = run_staged(captured, job.potential, job.other, folded, measure_memory=True, kept=())[1].memory
        assert memory is not None
        with seeded(0):
            inputs = captured.inputs(job.potential)
            measured, traced = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in (job.other, job.call))
        sizes = measured, traced
        run = run_of_call(captured, job.potential, job.other, folded)
        others = measure_activations(run, sizes, seconds, activations or {})
    elapsed = time.perf_counter() - began
    return Capture(captured, seconds, memory, elapsed, origin, sizes, alternative, others, not_evaluated)


@dataclass(frozen=True)
class _CaptureJob:
    """Brings one potential into stages, from a trace or from its own parts.

    Attributes:
        potential: the live potential.
        call: the call that is traced.
        other: the call on which the stages are validated and measured.
        placements, phase_mode, step_time, cache, graph_size, compiles: see :func:`capture_module`.
    """

    potential: nn.Module
    call: PotentialCall
    other: PotentialCall
    placements: Sequence[Sequence[int]]
    phase_mode: PhaseMode
    step_time: StepTime | None
    cache: ProgramCache | None
    graph_size: int
    compiles: bool


def _stages(job: _CaptureJob, stages: StageOrigin) -> tuple[StagedPotential, list[PhaseCosts], str, str]:
    """Returns stages, their times, their origin, and the alternative to them: the first way that works."""
    ways: dict[str, Callable[[_CaptureJob], tuple[StagedPotential, list[PhaseCosts], str]]]
    ways = {"captured": _from_trace, "explicit": _from_explicit_parts}
    has_own = isinstance(job.potential, ExplicitStages)
    if stages == "explicit" and not has_own:
        raise CaptureError(
            f"stages='explicit', but the potential {quoted(job.call.path)} ({type(job.potential).__name__}) declares "
            "none. Give it stage_inputs, stage_parts, stage_outputs and stage_coordinates "
            "(lightning_januspipe.ExplicitStages), or let it be traced with stages='auto'."
        )
    order = [stages] if stages != "auto" else ["captured", *(["explicit"] if has_own else [])]
    refused: list[CaptureError] = []
    for way in order:
        try:
            captured, seconds, origin = ways[way](job)
        except CaptureError as error:
            refused.append(error)
            continue
        notes = [f"tracing was refused ({error})" for error in refused]
        has_other = way == "captured" and has_own
        alternative = " Or take the stages that it declares, with stages='explicit'." if has_other else ""
        return captured, seconds, "; ".join([origin, *notes]), alternative
    if len(refused) == 1:
        raise refused[0]
    raise CaptureError(f"{refused[0]} The potential's own stages were refused too: {refused[1]}") from refused[0]


def _from_trace(job: _CaptureJob) -> tuple[CapturedPotential, list[PhaseCosts], str]:
    """Returns the potential in stages from a trace, new or cached; a cached trace is validated like a new one."""
    adapters = adapters_of(job.potential, job.graph_size)
    call, other = (
        replace(c, args=args, kwargs=kwargs)
        for c in (job.call, job.other)
        for args, kwargs in [adapted(adapters, job.potential, c.args, c.kwargs)]
    )
    form = CallFormat.of(call.args, call.kwargs, (other.args, other.kwargs))
    cache = job.cache or ProgramCache(None)
    began = time.perf_counter()
    key = ProgramKey(None) if job.cache is None else program_key(job.potential, call, form, adapters)
    known = cache.load(key.digest) if key.digest else None
    if key.digest and known is not None:
        origin = f"captured (its trace read from the cache in {time.perf_counter() - began:.1f} s)"
        try:
            return *_cut(job, call, form, known), origin
        except CaptureError:  # only a new trace tells whether the potential can be captured
            cache.discard(key.digest)
    began = time.perf_counter()
    program = apply_passes(trace_potential(job.potential, call, form, adapters))
    note = f", not cached: {key.reason}" if key.reason else ""
    origin = f"captured (traced in {time.perf_counter() - began:.1f} s{note})"
    found = _cut(job, call, form, program)
    if key.digest:
        cache.save(key.digest, program)
    return *found, origin


def _cut(
    job: _CaptureJob, call: PotentialCall, form: CallFormat, program: Program
) -> tuple[CapturedPotential, list[PhaseCosts]]:
    """Returns a traced potential in balanced, validated stages, and the stages' times."""
    regions = find_regions(program, call.read_outputs)
    captured = CapturedPotential(
        call.path,
        program,
        regions,
        Cut([], [], []),
        form,
        call.replaced,
        call.step_parameters,
        graph_size=job.graph_size,
    )
    tensors = captured.inputs(job.potential)(job.other.args, job.other.kwargs)
    profile = measure(program, regions, job.potential, tensors)
    if job.compiles:
        profile = with_compiled_work(program, profile, tensors[0].device.type)
    measured: list[tuple[CapturedPotential, list[PhaseCosts]]] = []
    for placement in job.placements:
        ranks = placement if len(placement) > len(set(placement)) else None
        try:
            candidate = replace(captured, cut=find_cut(program, regions, profile, len(placement), ranks))
            given = job.potential, job.other, job.phase_mode
            if job.compiles:
                measured.append(measure_for_compiling(candidate, *given))
            else:
                measured.append(balance_stages(candidate, profile, *given, placement))
        except CaptureError:
            if not measured:
                raise
    return fastest(measured, job.step_time)


def _from_explicit_parts(job: _CaptureJob) -> tuple[StagedPotential, list[PhaseCosts], str]:
    parts = explicit_potential(job.potential, job.call, job.other)
    measured = balance_parts(parts, job.potential, job.other, job.phase_mode, job.placements)
    return *fastest(measured, job.step_time), "cut at its own parts (explicit stages)"
