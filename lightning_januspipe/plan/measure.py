"""Captures a potential in one process, in the numbers of stages that a plan needs, and measures its phases."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from lightning_januspipe.capture import ActivationCosts, ActivationFactories, Capture, PhaseMode, capture_module
from lightning_januspipe.capture.activations import measure_activations, run_of_call
from lightning_januspipe.capture.find.grad_call import PotentialCall, call_arguments
from lightning_januspipe.capture.find.in_step import potential_of
from lightning_januspipe.capture.report import CutReport, report
from lightning_januspipe.capture.side_effects import silent_log
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import DEFAULT_MODE, run_staged, validate_stages
from lightning_januspipe.engine.messages import MessageForm, Parts, message_specs
from lightning_januspipe.engine.p2p import packed_size
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import TooFewParts
from lightning_januspipe.plan.compare import CutCosts
from lightning_januspipe.random_state import kept_random_state
from lightning_januspipe.schedule import Action, MemoryCosts, Phase, PhaseCosts
from lightning_januspipe.schedule.actions import Message

_LEAST_REPEATS = 7
_SECONDS = 5.0  # after which no more is measured


class TooManyRanks(ValueError):
    """Reports that a potential has fewer cuttable parts than ranks.

    Attributes:
        most: The number of its parts.
    """

    def __init__(self, num_ranks: int, most: int) -> None:
        super().__init__(f"{num_ranks} ranks, but the potential has only {most} cuttable part(s) of comparable cost")
        self.most = most


@dataclass(frozen=True)
class Measured:
    """Holds a potential in stages and its costs, medians over several walks of one micro-batch through all phases.

    Attributes:
        potential: The potential in stages.
        report: What the stages send, and what they compute again.
        costs: Seconds of the phases of each stage, nothing deferred.
        deferred: Seconds of the phases of each stage, with WF and WE deferred.
        memory: Bytes of each stage, nothing deferred.
        deferred_memory: Bytes of each stage, with WF and WE deferred.
        symbols: Sizes of the micro-batch.
        spread: Width of the middle half of the times of a walk, as a share of the median.
        repeats: Number of walks.
        elapsed: Seconds of the capture.
        placement: The rank of each stage.
        activations: What all stages take with each activation, nothing deferred, and with WF and WE deferred.
    """

    potential: StagedPotential
    report: CutReport
    costs: tuple[PhaseCosts, ...]
    deferred: tuple[PhaseCosts, ...]
    memory: tuple[MemoryCosts, ...]
    deferred_memory: tuple[MemoryCosts, ...]
    symbols: Mapping[str, int]
    spread: float
    repeats: int
    elapsed: float
    placement: tuple[int, ...]
    activations: Mapping[str, tuple[ActivationCosts, ActivationCosts]] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        """Returns the number of stages."""
        return len(self.costs)

    @property
    def on_ranks(self) -> str:
        """Returns the ranks of the stages, such as " on ranks 0 1 1 0"; empty with one stage on each rank."""
        is_plain = len(set(self.placement)) == len(self.placement)
        return "" if is_plain else f" on ranks {' '.join(map(str, self.placement))}"

    @property
    def uncertainty(self) -> float:
        """Returns how far the medians may be off, as a share: the spread over the root of the number of walks."""
        return self.spread / math.sqrt(self.repeats)

    def boundary(self, stage: int) -> list[tuple[str, TensorSpec]]:
        """Returns the names and specs of the tensors that a stage passes on to the next one."""
        return self.potential.boundary(stage)

    def message_bytes(self, message: Message) -> int:
        """Returns the bytes of a message as the executor packs it: the boundary, and what goes with it."""
        stage = message.target.stage
        before = [spec for _, spec in self.boundary(stage - 1)] if stage else []
        behind = [spec for _, spec in self.boundary(stage)] if stage < self.num_stages - 1 else []
        return self._packed(message_specs(message, self.potential.chain, self.num_stages, before, behind))

    def boundary_bytes(self, stage: int) -> int:
        """Returns the bytes that a stage passes on to the next one, on this micro-batch."""
        return self._packed(Parts([spec for _, spec in self.boundary(stage)]))

    def _packed(self, specs: Parts[TensorSpec]) -> int:
        return packed_size(MessageForm(specs, self.symbols).shapes())

    def choices(self, num_ranks: int, activations: Sequence[str]) -> list[CutCosts]:
        """Returns :meth:`stages` as measured, and then with each of some activations."""
        found = [self.stages(num_ranks)]
        for name in activations:
            plain, late = self.activations[name]
            own = replace(
                self, costs=plain.costs, memory=plain.memory, deferred=late.costs, deferred_memory=late.memory
            )
            found.append(replace(own.stages(num_ranks), activation=name))
        return found

    def stages(self, num_ranks: int) -> CutCosts:
        """Returns the costs for schedules of a number of ranks.

        With fewer stages than ranks, every rank gets an equal share of all work, memory and messages.
        """
        sizes = [
            self.message_bytes(Message(Action(phase, a, 0), Action(phase, b, 0)))
            for stage in range(self.num_stages - 1)
            for phase, a, b in (
                (Phase.FE, stage, stage + 1),
                (Phase.FF, stage + 1, stage),
                (Phase.BF, stage, stage + 1),
                (Phase.BE, stage + 1, stage),
            )
        ]
        typical = statistics.fmean(sizes) if sizes else 0.0
        if self.num_stages < num_ranks:
            return CutCosts(
                _share(self.costs, num_ranks),
                _share(self.deferred, num_ranks),
                _share(self.memory, num_ranks),
                _share(self.deferred_memory, num_ranks),
                message_bytes=typical,
                typical_message=typical,
            )
        return CutCosts(
            self.costs,
            self.deferred,
            self.memory,
            self.deferred_memory,
            message_bytes=self.message_bytes,
            typical_message=typical,
            chunks=self.num_stages // num_ranks,
        )


def _share(entries: Sequence[Any], num_ranks: int) -> Any:
    """Returns one rank's equal share of the sum over all stages."""
    names = [f.name for f in fields(entries[0])]
    return type(entries[0])(*(sum(getattr(entry, name) for entry in entries) / num_ranks for name in names))


def measure_stages(
    module: nn.Module,
    step: Callable[[Any], Any],
    traced_batch: Any,
    other_batch: Any,
    placement: Sequence[int],
    potential: str | None = None,
    *,
    repeats: int | None = None,
    or_fewer: bool = False,
    activations: Callable[[bool], ActivationFactories] = lambda _: {},
    graph_size: int = 1,
    compiles: bool = False,
) -> Measured:
    """Captures a potential in a number of stages, and measures its phases with and without deferral.

    Args:
        module: The LightningModule.
        step: Its training step, from a batch to the step's output.
        traced_batch: A batch of at least two structures.
        other_batch: A micro-batch with other sizes, on which times are measured.
        placement: The rank of each stage to cut into.
        potential: Dotted name of the potential; None to search it.
        repeats: Number of walks of one micro-batch through all phases; None for at least seven, and for five seconds.
        or_fewer: Whether to take as many stages as there are cuttable parts, where these are fewer.
        activations: Returns the activations to measure too, given whether WF and WE are deferred.
        graph_size: The largest number of graph ranks that the stages are sharded over afterwards.
        compiles: Whether phases will be compiled.

    Raises:
        TooManyRanks: The potential has fewer cuttable parts.
        CaptureError: The potential cannot be captured.
    """

    def capture(ranks: Sequence[int]) -> Capture:
        return capture_module(
            module,
            step,
            traced_batch,
            other_batch,
            [ranks],
            potential,
            phase_mode=PhaseMode(defer=True),
            graph_size=graph_size,
            compiles=compiles,
        )

    try:
        found = capture(placement)
    except TooFewParts as error:
        if not or_fewer:
            raise TooManyRanks(len(placement), error.most) from error
        placement = range(error.most)
        found = capture(placement)
    return _measured(found, module, step, other_batch, repeats, placement, activations)


def _measured(
    capture: Capture,
    module: nn.Module,
    step: Callable[[Any], Any],
    batch: Any,
    repeats: int | None,
    placement: Sequence[int],
    activations: Callable[[bool], ActivationFactories],
) -> Measured:
    captured = capture.potential
    with kept_random_state(), silent_log(module):
        arguments = call_arguments(module, captured.path, step, batch, captured.replaced is not None)
    call = PotentialCall(captured.path, *arguments, replaced=captured.replaced)
    submodule = potential_of(module, step, call)
    tensors = captured.inputs(submodule)(call.args, call.kwargs)
    profile = captured.profile(submodule, tensors)
    validate_stages(captured, submodule, call, DEFAULT_MODE)  # and a first walk without deferral, which warms up
    walks: dict[bool, list[list[PhaseCosts]]] = {False: [], True: []}
    began = time.perf_counter()
    while True:
        for defer, found in walks.items():  # in turn, so that other programs on the machine slow both alike
            found.append(run_staged(captured, submodule, call, PhaseMode(defer=defer))[1].costs)
        num = len(walks[False])
        if num >= (repeats or _LEAST_REPEATS) and (repeats or time.perf_counter() - began > _SECONDS):
            break
    memory, others = [], []
    for defer in walks:
        mode = PhaseMode(defer=defer)
        result = run_staged(captured, submodule, call, mode, measure_memory=True)[1]
        assert result.memory is not None
        memory.append(tuple(result.memory))
        costs = _medians(walks[defer])
        run = run_of_call(captured, submodule, call, mode)
        others.append(measure_activations(run, capture.sizes, costs, activations(defer)))
    return Measured(
        captured,
        report(captured, profile),
        tuple(_medians(walks[False])),
        tuple(_medians(walks[True])),
        memory[0],
        memory[1],
        captured.bind_sizes(tensors),
        max(_spread([sum(s.total for s in walk) for walk in found]) for found in walks.values()),
        num,
        capture.elapsed,
        tuple(placement),
        {name: (others[0][name], others[1][name]) for name in others[0]},
    )


def _spread(times: Sequence[float]) -> float:
    """Returns the width of the middle half of the times, as a share of the median."""
    if len(times) < 2:
        return 0.0
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / median


def _medians(walks: Sequence[Sequence[PhaseCosts]]) -> list[PhaseCosts]:
    """Returns the median over the walks for each phase of each stage."""
    names = [f.name for f in fields(PhaseCosts)]
    return [
        PhaseCosts(*(statistics.median(getattr(seconds, name) for seconds in of_stage) for name in names))
        for of_stage in zip(*walks, strict=True)
    ]
