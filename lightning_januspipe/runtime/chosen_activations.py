"""Chooses what each stage keeps between its phases, so that a step within the memory limit is as short as it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from lightning_januspipe.capture import ActivationCosts, ActivationFactories
from lightning_januspipe.engine.eager_stages import eager_stages
from lightning_januspipe.engine.single_process import StageFactory
from lightning_januspipe.runtime.planner import Planner
from lightning_januspipe.schedule.costs import format_bytes

if TYPE_CHECKING:
    from lightning_januspipe.compiled.minimum_cut import Activation

_ROUNDING = 1e-9


@dataclass(frozen=True)
class ChosenActivations:
    """Holds what each stage keeps between its phases.

    Attributes:
        names: The activation of each stage.
        placement: The rank of each stage.
        measured: What all stages take with each activation, the fastest first.
    """

    names: tuple[str, ...]
    placement: tuple[int, ...] | None
    measured: Mapping[str, ActivationCosts]

    def on(self, planner: Planner) -> Planner:
        """Returns a planner with the costs and the memory of these activations, and with the stages on these ranks.

        What is on the host comes back for one phase while another one runs, so that much of the limit is set aside.
        """
        chosen = [(self.measured[name].costs[i], self.measured[name].memory[i]) for i, name in enumerate(self.names)]
        costs, memory = zip(*chosen, strict=True)
        limit = planner.memory_limit
        if limit is not None and any(self.host_bytes):
            limit = max(limit - 2 * max(self.host_bytes), 1.0)
        return replace(planner, costs=costs, memory=memory, placement=self.placement, memory_limit=limit)

    @property
    def host_bytes(self) -> list[int]:
        """Returns the most bytes that a micro-batch keeps on the host in each stage."""
        return [sum(self.measured[name].host_bytes[i : i + 1]) for i, name in enumerate(self.names)]

    def describe(self, limit: float) -> str:
        """Returns in words what each stage keeps of a micro-batch, and what it would keep with other activations.

        Args:
            limit: The most bytes that the micro-batches of one rank may hold.
        """
        stages = []
        for index, chosen in enumerate(self.names):
            sizes = {name: costs.memory[index].total for name, costs in self.measured.items()}
            others = [f"{name} {format_bytes(size)}" for name, size in sizes.items() if name != chosen]
            instead = f" ({', '.join(others)})" if others else ""
            on_host = f" and {format_bytes(self.host_bytes[index])} on the host" if self.host_bytes[index] else ""
            stages.append(f"stage {index} {chosen} {format_bytes(sizes[chosen])}{on_host}{instead}")
        return f"kept of a micro-batch, within {format_bytes(limit)} on a rank: {', '.join(stages)}"


def candidates(compiles: bool, activation: str, device: str) -> tuple[str, ...]:
    """Returns the activations that a memory limit may choose from, the fastest first.

    Args:
        compiles: Whether phases are compiled.
        activation: The activation that the user has given, or "auto".
        device: Type of the device; on CPUs the host's memory is the device's.
    """
    if activation != "auto":
        return (activation,)
    return ("pointwise" if compiles else "keep", *(["offload"] if device == "cuda" else []), "recompute")


def activation_factories(compiles: bool, names: Sequence[str], device: str, defer: bool) -> ActivationFactories:
    """Returns what makes stages with some activations, to measure what they take.

    Args:
        compiles: Whether phases are compiled.
        names: The activations.
        device: Type of the device.
        defer: Whether WF and WE are deferred.
    """
    if compiles:
        from lightning_januspipe.compiled.measured import interpreted_factories

        return interpreted_factories(cast("Sequence[Activation]", names), device, defer)
    return {name: partial(_eager_factory, name) for name in names}


def _eager_factory(name: str, _: object) -> StageFactory:
    return eager_stages(name)


def choose_activations(
    planner: Planner, measured: Mapping[str, ActivationCosts], num_microbatches: int
) -> ChosenActivations:
    """Chooses an activation for the stages of each rank.

    The fastest activation is taken everywhere if the limit makes no step longer with it. Otherwise a rank that keeps
    less may hold more micro-batches, so predicted steps decide: every rank starts with the activation that keeps least,
    and takes a faster one if that fits and makes the step no longer, the busiest rank first.

    Args:
        planner: Builds schedules within the limit.
        measured: What all stages take with each activation, the fastest first.
        num_microbatches: Micro-batches of most steps.
    """
    fastest, smallest = next(iter(measured)), list(measured)[-1]
    num_stages = len(measured[fastest].costs)
    free = replace(planner, memory_limit=None)
    unplaced = ChosenActivations((fastest,) * num_stages, planner.placement, measured)
    placement = unplaced.on(free).schedule(num_microbatches).placement
    plain = replace(unplaced, placement=placement)
    least = replace(plain, names=(smallest,) * num_stages)

    def step_time(chosen: ChosenActivations) -> float | None:
        try:
            return chosen.on(planner).step_time(num_microbatches)
        except ValueError:  # it does not fit
            return None

    of_plain = step_time(plain)
    unlimited = plain.on(free).step_time(num_microbatches)
    if of_plain is not None and of_plain <= unlimited * (1 + _ROUNDING):
        return plain
    best, of_best = least, step_time(least)
    if of_best is None:
        return least  # with which building the schedule says what does not fit
    work = dict.fromkeys(placement, 0.0)
    for stage, rank in enumerate(placement):
        work[rank] += measured[smallest].costs[stage].total
    for rank in sorted(work, key=lambda rank: -work[rank]):
        for name in list(measured)[:-1]:
            names = tuple(name if r == rank else other for r, other in zip(placement, best.names, strict=True))
            candidate = replace(best, names=names)
            time = step_time(candidate)
            if time is not None and time <= of_best * (1 + _ROUNDING):
                best, of_best = candidate, time
                break
    return plain if of_plain is not None and of_plain <= of_best else best
