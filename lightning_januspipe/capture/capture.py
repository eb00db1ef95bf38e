"""From a LightningModule and a few samples to a captured, cut and validated potential."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.adapters import adapted, adapters_of
from lightning_januspipe.capture.calls import CallFormat
from lightning_januspipe.capture.cut import Cut, Profile, find_cut, find_regions
from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.find import PotentialCall, StepFunction, call_arguments, find_potential
from lightning_januspipe.capture.instep import StepPotential
from lightning_januspipe.capture.profile import measure
from lightning_januspipe.capture.stages import CallInputs, CapturedPotential
from lightning_januspipe.capture.step import kept_random_state, silent_log
from lightning_januspipe.capture.trace import trace_potential
from lightning_januspipe.capture.validate import TOGETHER, Manner, run_captured, validate, validate_evaluation
from lightning_januspipe.engine.local import PhaseSeconds
from lightning_januspipe.engine.memory import PhaseBytes

_REFINEMENTS = 3
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Capture:
    """A captured potential.

    Attributes:
        potential: program and cut.
        seconds: measured phase times of each stage.
        bytes: measured memory of one micro-batch in each stage.
        elapsed: seconds that the capture took.
    """

    potential: CapturedPotential
    seconds: list[PhaseSeconds]
    bytes: list[PhaseBytes]
    elapsed: float

    def describe(self) -> str:
        """One line for a user: what was found, and how it is divided."""
        total = sum(s.total for s in self.seconds)
        shares = " + ".join(f"{100 * s.total / total:.0f} %" for s in self.seconds)
        kilobytes = ", ".join(f"{b / 1e3:.0f}" for b in self.potential.cut.boundary_bytes)
        return (
            f"potential {self.potential.path!r} ({len(self.potential.program.nodes)} operations) in {len(self.seconds)}"
            f" stages with {shares} of the work, boundaries of {kilobytes} kB, captured in {self.elapsed:.1f} s"
        )


def capture_module(
    module: nn.Module,
    step: StepFunction,
    traced_batch: Any,
    other_batch: Any,
    placements: Sequence[Sequence[int]],
    potential: str | None = None,
    *,
    manner: Manner = TOGETHER,
    step_time: Callable[[list[PhaseSeconds]], float] | None = None,
    evaluation_step: StepFunction | None = None,
) -> Capture:
    """Find, trace, cut and validate the potential of a module.

    Args:
        module: the LightningModule, left as it was.
        step: its training (or evaluation) step, from a batch to what it returns.
        traced_batch: at least two structures.
        other_batch: other numbers of atoms, edges and structures, about a micro-batch's size: the potential is
            validated and profiled on it.
        placements: the rank of each stage to cut into; of several placements that with the shortest step. Those after
            the first are left out where the potential has fewer cuttable parts.
        potential: dotted name of the potential, where the user gave one.
        manner: how the phases will be run.
        step_time: the time of a training step from the measured phases of each stage; needed for several placements.
        evaluation_step: the step that validation during training will run; where the steps differentiate by
            themselves, it has to compute the same energy.

    Raises:
        CaptureError: see its message.
    """
    began = time.perf_counter()
    with _unchanged(module):
        found = find_potential(module, step, traced_batch, potential)
        submodule = potential_of(module, step, found)
        other = replace(
            found, **_arguments(call_arguments(module, found.path, step, other_batch, found.replaced is not None))
        )
        adapters = adapters_of(submodule)
        call, second = (
            replace(c, **_arguments(adapted(adapters, submodule, c.args, c.kwargs))) for c in (found, other)
        )
        form = CallFormat.of(call.args, call.kwargs, (second.args, second.kwargs))
        program = trace_potential(submodule, call, form, adapters)
        regions = find_regions(program, found.read_outputs)
        captured = CapturedPotential(
            found.path, program, regions, Cut([], [], []), form, found.replaced, found.step_parameters
        )
        tensors = CallInputs(captured, submodule)(other.args, other.kwargs)
        profile = measure(program, regions, submodule, tensors)
        measured: list[tuple[CapturedPotential, list[PhaseSeconds]]] = []
        for placement in placements:
            ranks = placement if len(placement) > len(set(placement)) else None
            try:
                cut = find_cut(program, regions, profile, len(placement), ranks)
                candidate = replace(captured, cut=cut)
                measured.append(_balance(candidate, profile, submodule, other, manner, placement))
            except CaptureError:
                if not measured:
                    raise
        captured, seconds = _fastest(measured, step_time)
        if manner.apart:
            validate(captured, submodule, other, manner)
        evaluated = potential_of(module, evaluation_step or step, found)
        validate_evaluation(captured, evaluated, other)
        bytes_ = run_captured(captured, submodule, other, replace(manner, apart=False), measure_memory=True)[1].bytes
        assert bytes_ is not None
    return Capture(captured, seconds, bytes_, time.perf_counter() - began)


def potential_of(module: nn.Module, step: StepFunction, call: PotentialCall) -> nn.Module:
    """The module whose forward is captured: a submodule, or the step's part before it differentiates."""
    if call.replaced is None:
        return module.get_submodule(call.path)
    return StepPotential(module, step, call.replaced)


def _arguments(call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    return {"args": call[0], "kwargs": call[1]}


def _fastest(
    measured: list[tuple[CapturedPotential, list[PhaseSeconds]]],
    step_time: Callable[[list[PhaseSeconds]], float] | None,
) -> tuple[CapturedPotential, list[PhaseSeconds]]:
    """The cut with the shortest step; one with more stages, and so more messages, has to gain what it may cost."""
    best = measured[0]
    for other in measured[1:]:
        assert step_time is not None, "only the time of a step can choose between placements"
        more = other[0].cut.num_stages > best[0].cut.num_stages
        if step_time(other[1]) < (1 - _LEAST_GAIN if more else 1) * step_time(best[1]):
            best = other
    return best


def _balance(
    captured: CapturedPotential,
    profile: Profile,
    potential: nn.Module,
    call: PotentialCall,
    manner: Manner,
    placement: Sequence[int],
) -> tuple[CapturedPotential, list[PhaseSeconds]]:
    """Validate, measure all phases, and move the cut to where these are balanced.

    A stage's forward time says little about its double backward, so the costs of its operations are scaled to the
    measured sum of its phases and the cut is sought again.
    """
    folded = replace(manner, apart=False)  # costs are those of a stage whose phases are together

    def measured(candidate: CapturedPotential) -> list[PhaseSeconds]:
        validate(candidate, potential, call, folded)
        return run_captured(candidate, potential, call, folded)[1].seconds  # the second run is warm

    def slowest(seconds: list[PhaseSeconds]) -> float:
        """Time of the busiest rank."""
        work = dict.fromkeys(placement, 0.0)
        for rank, stage in zip(placement, seconds, strict=True):
            work[rank] += stage.total
        return max(work.values())

    several = placement if len(placement) > len(set(placement)) else None
    best, best_seconds = captured, measured(captured)
    seen, current, seconds = {_key(captured.cut)}, captured, best_seconds
    for _ in range(_REFINEMENTS if captured.cut.num_stages > 1 else 0):
        profile = _scaled(profile, current.cut, seconds)
        try:
            cut = find_cut(current.program, current.regions, profile, current.cut.num_stages, several)
        except CaptureError:  # by the new costs a part is too small for a stage
            break
        if _key(cut) in seen:
            break
        seen.add(_key(cut))
        current = replace(current, cut=cut)
        seconds = measured(current)
        if slowest(seconds) < slowest(best_seconds):
            best, best_seconds = current, seconds
    return best, best_seconds


def _key(cut: Cut) -> tuple[int, ...]:
    return tuple(len(b) for b in cut.bodies)


def _scaled(profile: Profile, cut: Cut, seconds: list[PhaseSeconds]) -> Profile:
    scaled = dict(profile.seconds)
    for names, cost, measured in zip(cut.bodies, cut.costs, seconds, strict=True):
        for name in names:
            scaled[name] = profile.seconds.get(name, 0.0) * measured.total / max(cost, 1e-9)
    return Profile(scaled, profile.num_bytes)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Capture runs the user's step a few times; all that a step may change stays as it was.

    That is buffers, metrics, attributes of modules (lists that collect outputs, counters), gradients, random numbers.
    """
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    metrics = {m: _metric_state(m) for m in module.modules() if hasattr(m, "_copy_state_dict")}
    gradients = {p: p.grad for p in module.parameters()}
    attributes = {m: _attributes(m) for m in module.modules() if m not in metrics}
    with kept_random_state(), silent_log(module):
        try:
            yield
        finally:
            for owner, kept in attributes.items():
                _restore_attributes(owner, kept)
            for name, buffer in module.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
            for metric, state in metrics.items():
                metric.__dict__.update(state)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


_CONTAINERS = (list, dict, set)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Public attributes that a step may change, containers with what they hold."""
    names = [n for n in vars(module) if not n.startswith("_") and n not in ("training", "log", "forward")]
    values = {n: vars(module)[n] for n in names}
    return {n: (v, copy.copy(v)) if isinstance(v, _CONTAINERS) else (v, None) for n, v in values.items()}


def _restore_attributes(module: nn.Module, kept: dict[str, Any]) -> None:
    for name in [n for n in vars(module) if not n.startswith("_") and n not in ("training", "log", "forward")]:
        if name not in kept:
            del vars(module)[name]
    for name, (value, held) in kept.items():
        vars(module)[name] = value
        if held is not None and len(value) != len(held):
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)


def _metric_state(metric: Any) -> dict[str, Any]:
    """A torchmetrics metric's states and counters."""
    kept = {**metric._copy_state_dict()}
    for name in ("_update_count", "_computed", "_forward_cache"):
        if name in metric.__dict__:
            kept[name] = metric.__dict__[name]
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
