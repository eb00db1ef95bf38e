"""Chooses what the ranks that hold the same stages share, and what stages keep, so that a step is short within a limit.

All that a rank holds between phases counts: parameters, gradients, optimizer state, and what micro-batches keep.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_januspipe.capture import Capture
from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.distributed import waiting
from lightning_januspipe.expert_ranks import bounds_of, spread_experts
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.chosen_activations import ChosenActivations, choose_activations
from lightning_januspipe.runtime.optimizer_bytes import optimizer_state_bytes
from lightning_januspipe.runtime.planner import Planner
from lightning_januspipe.runtime.state_share import fastest_level, state_share
from lightning_januspipe.runtime.state_units import all_gather
from lightning_januspipe.schedule import Link, Schedule, StateCosts
from lightning_januspipe.schedule.costs import format_bytes
from lightning_januspipe.schedule.state_actions import ShardLevel

_MEASURED_BYTES = (1 << 10, 1 << 22)  # of the two messages that latency and bandwidth follow from
_REPEATS = 3


@dataclass(frozen=True)
class StageSharing:
    """Says which ranks hold the same stages, and what they may share.

    Attributes:
        levels: What they may share, the simplest first.
        num_ranks: The number of these ranks, D·G.
        link: Costs of a message between two of them.
        optimizers: The user's optimizers over the whole module.
        others_leave: Whether the parameters of other stages leave a rank's memory.
        accumulates: Whether an optimizer step has several batches.
        expert_size: Number of these ranks that share experts.
    """

    levels: Sequence[ShardLevel] = ("none",)
    num_ranks: int = 1
    link: Link = field(default_factory=Link)
    optimizers: Sequence[Optimizer] = ()
    others_leave: bool = False
    accumulates: bool = False
    expert_size: int = 1


@dataclass(frozen=True)
class ChosenState:
    """Holds what the ranks that hold the same stages share, and what each stage keeps between its phases.

    Attributes:
        level: What is shared.
        costs: Costs of the changes of each stage's state.
        activations: What each stage keeps, if there was a choice.
        state: Bytes of parameters, gradients and optimizer state of the fullest rank, by level; empty without a limit.
        seconds: The predicted step with each level that fits.
    """

    level: ShardLevel
    costs: tuple[StateCosts, ...]
    activations: ChosenActivations | None
    state: dict[ShardLevel, float]
    seconds: dict[ShardLevel, float]

    def on(self, planner: Planner) -> Planner:
        """Returns a planner for this choice."""
        found = planner if self.activations is None else self.activations.on(planner)
        return replace(found, level=self.level, state=self.costs, reserved=self.state.get(self.level, 0.0))

    def describe(self, limit: float) -> str:
        """Returns in words what was chosen, and what the alternatives take.

        Args:
            limit: The most bytes of a rank.
        """
        levels = []
        for level, state in self.state.items():
            step = f", a step of {1e3 * self.seconds[level]:.3g} ms" if level in self.seconds else ", does not fit"
            levels.append(f"{level!r} {format_bytes(state)}{step if len(self.state) > 1 else ''}")
        words = f"parameters, gradients and optimizer state of a rank, with shard={'; '.join(levels)}"
        if len(self.state) > 1:
            words += f"; chosen: shard={self.level!r}"
        return words if self.activations is None else f"{words}; {self.activations.describe(limit)}"


def choose_state(
    planner: Planner,
    found: Capture,
    module: nn.Module,
    sharing: StageSharing,
    limit: float | None,
    num_microbatches: int,
) -> ChosenState:
    """Chooses the level of sharing, and with it what each stage keeps, with the shortest predicted step.

    Args:
        planner: Builds schedules, without a limit.
        found: The captured potential.
        module: The LightningModule, whole.
        sharing: What may be shared. Without a limit the first level is taken.
        limit: The most bytes of a rank, or None.
        num_microbatches: Micro-batches of most steps.

    Raises:
        ValueError: Nothing fits.
    """
    if limit is None and sharing.levels[0] == "none":
        return ChosenState("none", (), None, {}, {})
    state = _StageState(found, module, planner.schedule(num_microbatches), sharing)
    if limit is None:
        return ChosenState(sharing.levels[0], state.costs, None, {}, {})
    held, reserved, choices, error = {}, {}, {}, ""
    state.measure_optimizers()
    for level in sharing.levels:
        reserved[level], held[level] = state.bytes(level)
        if held[level] > limit:
            continue
        limited = replace(planner, memory_limit=limit, level=level, state=state.costs, reserved=reserved[level])
        try:
            activations = None
            if found.activations:
                activations = choose_activations(limited, found.activations, num_microbatches)
                limited = activations.on(limited)
            choices[level] = activations, limited.step_time(num_microbatches)
        except ValueError as caught:
            error = str(caught)
    if not choices:
        words = ", ".join(f"{format_bytes(size)} with shard={level!r}" for level, size in held.items())
        raise ValueError(
            error
            or f"memory_limit={limit:.4g} bytes per rank, but parameters, gradients and optimizer state alone take "
            f"{words}, without what micro-batches keep: use more ranks of the pipeline or replicas, or raise the limit."
        )
    times = {name: seconds for name, (_, seconds) in choices.items()}
    level = fastest_level(times)
    return ChosenState(level, state.costs, choices[level][0], reserved, times)


class _StageState:
    """Counts the state of each rank of a pipeline."""

    def __init__(self, found: Capture, module: nn.Module, schedule: Schedule, sharing: StageSharing) -> None:
        self._module, self._sharing = module, sharing
        inside = dict(module.get_submodule(found.potential.path).named_parameters())
        stages_of = {inside[name]: stages for name, stages in found.potential.parameter_stages().items()}
        placements = schedule.placement, schedule.force_placement
        every = range(schedule.num_ranks)
        of_stages = [0] * schedule.num_stages
        spread: Collection[str] = ()
        if sharing.expert_size > 1 and isinstance(found.potential, CapturedPotential):
            spread = spread_experts(found.potential, sharing.expert_size).parameters
        self._spread = {inside[name] for name in spread}
        self._ranks = {}
        self._alone = set()
        for parameter in module.parameters():
            stages = stages_of.get(parameter)
            ranks = {p[s] for s in stages for p in placements} if stages else set(every)
            self._ranks[parameter] = ranks
            is_alone = bool(stages) and len(stages or ()) == len(ranks) == 1 and parameter not in self._spread
            if stages and is_alone and parameter.requires_grad:
                self._alone.add(parameter)
                of_stages[next(iter(stages))] += _bytes(parameter)
        self._every = every
        self._kept: dict[nn.Parameter, int] = {}
        self.costs = tuple(StateCosts.of(sharing.num_ranks, size, sharing.link) for size in of_stages)

    def measure_optimizers(self) -> None:
        """Measures the optimizer state of all parameters."""
        for optimizer in self._sharing.optimizers:
            self._kept.update(optimizer_state_bytes(optimizer))

    def bytes(self, level: ShardLevel) -> tuple[float, float]:
        """Returns the bytes of the fullest rank while phases run, and the most of any rank at any time."""
        sharing, in_phases, most = self._sharing, 0.0, 0.0
        for rank in self._every:
            own = others = state = whole = experts = of_experts = 0.0
            for parameter, ranks in self._ranks.items():
                size = _bytes(parameter)
                if rank in ranks and parameter in self._spread:
                    part = self._part_of_experts(parameter)
                    whole += part * size
                    if parameter in self._kept:
                        experts += part * size
                        of_experts += part * self._kept[parameter]
                    continue
                if rank in ranks or not sharing.others_leave:
                    whole += size
                if rank in ranks and parameter in self._kept:
                    own, others = (own + size, others) if parameter in self._alone else (own, others + size)
                    state += self._kept[parameter]
            share = state_share(level, sharing.num_ranks, own, state, sharing.accumulates)
            gradients = others + experts
            if level != "none":  # shared by the ranks that own the same experts
                of_experts *= sharing.expert_size / sharing.num_ranks
            rest = whole - own + gradients + of_experts
            accumulated = gradients if sharing.accumulates else 0.0
            copied = others if sharing.num_ranks > 1 else 0.0
            copied += experts if sharing.num_ranks > sharing.expert_size else 0.0
            in_phases = max(in_phases, share.in_phases + rest + accumulated)
            most = max(most, in_phases, share.in_reduction + rest + copied)
        return in_phases, most

    def _part_of_experts(self, parameter: nn.Parameter) -> float:
        """Returns the largest part of a parameter of experts that a rank holds."""
        num_experts = parameter.shape[0]
        bounds = bounds_of(num_experts, self._sharing.expert_size)
        return max(end - begin for begin, end in pairwise(bounds)) / num_experts


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def measured_link(mesh: Mesh, broadcast: Callable[[Link], Link]) -> Link:
    """Measures the messages of the ranks that hold the same stages, by gathering little and much.

    Args:
        mesh: This rank's process groups; all ranks call this.
        broadcast: Returns an object of the first rank on all ranks.
    """
    size = mesh.shape.data * mesh.shape.graph
    times = []
    for num_bytes in _MEASURED_BYTES:
        mine = torch.zeros(num_bytes // size, dtype=torch.uint8, device=mesh.device)
        whole = mine.new_empty(size * mine.numel())
        taken = []
        for _ in range(_REPEATS + 1):
            began = time.perf_counter()
            with waiting("measuring of collectives", mesh.stage_group):
                all_gather(whole, mine, group=mesh.stage_group)
            if mine.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        times.append(statistics.median(taken[1:]))
    small, large = times
    passes = size - 1
    per_byte = max(large - small, 0.0) / (_MEASURED_BYTES[1] - _MEASURED_BYTES[0]) * size / passes
    return broadcast(Link(small / passes, 1 / per_byte if per_byte else float("inf")))
