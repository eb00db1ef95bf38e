"""Moves cuts to where the measured phases are balanced, and chooses between placements by the time of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations, pairwise
from typing import TypeVar

from torch import nn

from lightning_januspipe.capture.cut.cut import Cut, Profile, find_cut
from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import PhaseMode, validate_stages
from lightning_januspipe.errors import CaptureError, TooFewParts, quoted
from lightning_januspipe.schedule import PhaseCosts

_REFINEMENTS = 3  # times that the cut is moved
_LEAST_GAIN = 0.02  # share of the step that more stages have to save, as they send more messages
# Up to this many ways to join parts into stages are tried; beyond it, every stage gets as many parts.
_TRIED_BOUNDS = 20_000

_Staged = TypeVar("_Staged", bound=StagedPotential)
StepTime = Callable[[list[PhaseCosts]], float]


def fastest(
    measured: list[tuple[_Staged, list[PhaseCosts]]], step_time: StepTime | None
) -> tuple[_Staged, list[PhaseCosts]]:
    """Returns the potential with the shortest step. More stages send more messages, so they have to gain a little."""
    best = measured[0]
    for other in measured[1:]:
        assert step_time is not None, "only the time of a step can choose between placements"
        more = other[0].num_stages > best[0].num_stages
        if step_time(other[1]) < (1 - _LEAST_GAIN if more else 1) * step_time(best[1]):
            best = other
    return best


def balance_stages(
    captured: CapturedPotential,
    profile: Profile,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode,
    placement: Sequence[int],
) -> tuple[CapturedPotential, list[PhaseCosts]]:
    """Validates the stages, measures all their phases, and moves the cut to where these are balanced.

    A stage's forward time says little about its double backward, so the costs of its operations are scaled to the
    measured sum of its phases, and the cut is searched again.

    Args:
        captured: the potential in stages.
        profile: measured costs of its operations.
        potential: the live potential.
        call: the call on which it is validated and measured.
        phase_mode: how the phases will be run.
        placement: the rank of each stage.
    """
    folded = replace(phase_mode, split_stages=False)  # costs are those of a stage with all phases on one rank

    def measured(candidate: CapturedPotential) -> list[PhaseCosts]:
        # The first run is a warm-up.
        return validate_stages(candidate, potential, call, folded, num_runs=2, one_group=True)

    several = placement if len(placement) > len(set(placement)) else None
    best, best_seconds = captured, measured(captured)
    seen, current, seconds = {_key(captured.cut)}, captured, best_seconds
    for _ in range(_REFINEMENTS if captured.cut.num_stages > 1 else 0):
        profile = _scaled(profile, current.cut, seconds)
        try:
            cut = find_cut(current.program, current.regions, profile, current.cut.num_stages, several)
        except CaptureError:  # with the new costs a part is too small for a stage
            break
        if _key(cut) in seen:
            break
        seen.add(_key(cut))
        current = replace(current, cut=cut)
        seconds = measured(current)
        if _slowest(seconds, placement) < _slowest(best_seconds, placement):
            best, best_seconds = current, seconds
    return best, best_seconds


def measure_for_compiling(
    captured: CapturedPotential, potential: nn.Module, call: PotentialCall, phase_mode: PhaseMode
) -> tuple[CapturedPotential, list[PhaseCosts]]:
    """Validates stages that were cut for the estimated work of compiled phases, and measures their eager phases.

    Args:
        captured: the potential in stages.
        potential: the live potential.
        call: the call on which it is validated and measured.
        phase_mode: how the phases will be run.

    Returns:
        The potential as it is, and for each stage its share of the measured time, in proportion to its work.
    """
    folded = replace(phase_mode, split_stages=False)
    measured = validate_stages(captured, potential, call, folded, num_runs=2, one_group=True)
    whole, work = sum(costs.total for costs in measured), captured.cut.costs
    factors = [whole * w / sum(work) / costs.total for w, costs in zip(work, measured, strict=True)]
    return captured, [_times(costs, factor) for costs, factor in zip(measured, factors, strict=True)]


def _times(costs: PhaseCosts, factor: float) -> PhaseCosts:
    """Returns costs with each phase's time multiplied by a factor."""
    return PhaseCosts(*(factor * getattr(costs, phase.name) for phase in fields(costs)))


def _key(cut: Cut) -> tuple[int, ...]:
    return tuple(len(b) for b in cut.bodies)


def _scaled(profile: Profile, cut: Cut, seconds: list[PhaseCosts]) -> Profile:
    scaled = dict(profile.seconds)
    for names, cost, measured in zip(cut.bodies, cut.costs, seconds, strict=True):
        for name in names:
            scaled[name] = profile.seconds.get(name, 0.0) * measured.total / max(cost, 1e-9)
    return replace(profile, seconds=scaled)


def _slowest(seconds: Sequence[PhaseCosts], placement: Sequence[int]) -> float:
    """Returns the time of the busiest rank."""
    work = dict.fromkeys(placement, 0.0)
    for rank, stage in zip(placement, seconds, strict=True):
        work[rank] += stage.total
    return max(work.values())


def balance_parts(
    parts: ExplicitPotential,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode,
    placements: Sequence[Sequence[int]],
) -> list[tuple[ExplicitPotential, list[PhaseCosts]]]:
    """Validates a potential's own parts, measures them, and joins them to balanced stages for each placement.

    Args:
        parts: the potential with each part as a stage.
        potential: the live potential.
        call: the call on which it is validated and measured.
        phase_mode: how the phases will be run.
        placements: for each possible number of stages the rank of each stage; placements with more stages than there
            are parts are left out.

    Raises:
        CaptureError: the parts compute something else than the potential's forward.
        TooFewParts: every placement has more stages than there are parts.
    """
    folded = replace(phase_mode, split_stages=False)
    of_parts = validate_stages(parts, potential, call, folded, num_runs=2, one_group=True)
    found = []
    for placement in placements:
        if len(placement) > parts.num_stages:
            continue
        joined = replace(parts, bounds=_bounds([s.total for s in of_parts], placement))
        found.append((joined, validate_stages(joined, potential, call, folded, num_runs=2, one_group=True)))
    if not found:
        raise TooFewParts(
            f"pipeline_size={len(set(placements[0]))}, but the potential {quoted(parts.path)} has {parts.num_stages} "
            f"parts. Use pipeline_size={parts.num_stages} or less, and give the other ranks to data_size, or make more "
            "parts.",
            most=parts.num_stages,
        )
    return found


def _bounds(costs: Sequence[float], placement: Sequence[int]) -> tuple[int, ...]:
    """Returns the first part of each stage, and the number of parts, so that the busiest rank has the least to do."""
    num_parts, num_stages = len(costs), len(placement)

    def slowest(bounds: Sequence[int]) -> float:
        work = dict.fromkeys(placement, 0.0)
        for rank, (first, last) in zip(placement, pairwise(bounds), strict=True):
            work[rank] += sum(costs[first:last])
        return max(work.values())

    if math.comb(num_parts - 1, num_stages - 1) <= _TRIED_BOUNDS:
        inner = combinations(range(1, num_parts), num_stages - 1)
        return min(((0, *cuts, num_parts) for cuts in inner), key=slowest)
    return tuple(round(i * num_parts / num_stages) for i in range(num_stages + 1))
