"""Measures what stages take with other activations than that of the capture: times of phases, and bytes kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import PhaseMode, run_staged
from lightning_januspipe.engine.single_process import SingleProcessResult, StageFactory
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts

Sizes = tuple[Mapping[str, int], Mapping[str, int]]
"""The values of all size symbols in the call that is measured, and in the call that was traced."""

ActivationFactories = Mapping[str, Callable[[Sizes], StageFactory]]
"""For each activation what makes its stages, the fastest first."""


MicrobatchRun = Callable[[StageFactory, bool], SingleProcessResult]
"""Runs a micro-batch through all phases of the stages that are made; the second argument: whether to measure memory."""


def run_of_call(
    staged: StagedPotential, potential: nn.Module, call: PotentialCall, phase_mode: PhaseMode
) -> MicrobatchRun:
    """Returns what runs a call of a potential.

    Args:
        staged: the potential in stages.
        potential: the live potential.
        call: the call.
        phase_mode: how the phases will be run.
    """

    def run(make_stage: StageFactory, measures_memory: bool) -> SingleProcessResult:
        return run_staged(staged, potential, call, phase_mode, measures_memory, make_stage=make_stage, kept=())[1]

    return run


@dataclass(frozen=True)
class ActivationCosts:
    """Holds what the stages take with one activation.

    Attributes:
        costs: seconds of the phases of each stage.
        memory: bytes that a micro-batch keeps on the device in each stage.
        host_bytes: the most bytes that it keeps on the host in each stage.
    """

    costs: tuple[PhaseCosts, ...]
    memory: tuple[MemoryCosts, ...]
    host_bytes: tuple[int, ...] = ()


def measure_activations(
    run: MicrobatchRun,
    sizes: Sizes,
    costs: Sequence[PhaseCosts],
    factories: ActivationFactories,
) -> dict[str, ActivationCosts]:
    """Runs a micro-batch through all phases with each activation.

    Times are those of the capture, in the ratios that the activations have to the first of them: phase graphs that run
    operation by operation are slower than the compiled ones, and all of them alike.

    Args:
        run: runs the micro-batch.
        sizes: the sizes of the whole micro-batch, and of another one.
        costs: seconds of the phases of each stage, as the capture measured them.
        factories: the activations.
    """
    found: dict[str, ActivationCosts] = {}
    first: Sequence[PhaseCosts] = ()
    for name, factory in factories.items():
        make_stage = factory(sizes)
        run(make_stage, False)  # a warm-up
        times, measured = run(make_stage, False).costs, run(make_stage, True)
        assert measured.memory is not None and measured.host_bytes is not None
        first = first or times
        scaled = [_scaled(*stage) for stage in zip(costs, times, first, strict=True)]
        found[name] = ActivationCosts(tuple(scaled), tuple(measured.memory), tuple(measured.host_bytes))
    return found


def _scaled(costs: PhaseCosts, found: PhaseCosts, first: PhaseCosts) -> PhaseCosts:
    """Returns costs times the ratio of two measurements, phase by phase."""
    scale = costs.total / first.total
    values = []
    for phase in fields(PhaseCosts):
        cost, time, base = (getattr(c, phase.name) for c in (costs, found, first))
        values.append(cost * time / base if cost and base else time * scale)
    return PhaseCosts(*values)
