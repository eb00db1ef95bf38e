"""Modules that break the pipeline they are trained in, each in one way, for as long as their training lasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import tiny
import torch
from torch import Tensor

from lightning_januspipe.engine import executor
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.messages import Parts
from lightning_januspipe.engine.stage import SplitStage, Stage
from lightning_januspipe.graph import collectives
from lightning_januspipe.runtime import parameters
from lightning_januspipe.runtime.user_step import CapturedStep
from lightning_januspipe.schedule import Phase


def tied_module() -> Any:
    """Returns a module of three layers; the first and the last share weights, so that two stages read them."""
    module = tiny.module(num_layers=3)
    first, _, last = module.potential.energy_model.layers
    last.self_connection = first.self_connection
    last.radial_network.linears[1] = first.radial_network.linears[1]
    return module


def mutated(name: str, at: str, make_module: Callable[[], Any] = tied_module) -> Any:
    """Returns a module that brings a fault with it until its teardown.

    Args:
        name: of the fault.
        at: hook of the module that installs it; the potential is captured after ``on_train_start``.
        make_module: makes the module.
    """
    module = make_module()
    target, attribute, replacement = MUTATIONS[name]()
    fault = patch.object(target, attribute, replacement)
    setattr(module, at, lambda *_: fault.start())
    module.teardown = lambda stage: fault.stop()
    return module


def data() -> Any:
    """Returns data of a few small structures, in two batches."""
    return tiny.data(num_train=12, batch_size=6)


Mutation = tuple[Any, str, Callable[..., Any]]


def _unchanged() -> Mutation:
    run = Stage.backward_force
    return Stage, "backward_force", lambda self, *args, **more: run(self, *args, **more)


def _no_second_order_term() -> Mutation:
    run = Stage.backward_force

    def backward_force(self: Stage, microbatch: int, *args: Any, **more: Any) -> Any:
        sent = run(self, microbatch, *args, **more)
        self._inflight[microbatch].entering = []
        return sent

    return Stage, "backward_force", backward_force


def _scaled_message(phase: Phase, factor: float) -> Mutation:
    run = executor.StepInProgress.hand_on

    def hand_on(self: Any, message: Any, parts: Parts[Tensor]) -> None:
        if message.source.phase is message.target.phase is phase:
            scaled = [t * factor if t.is_floating_point() else t for t in parts.boundary]
            parts = replace(parts, boundary=scaled)
        run(self, message, parts)

    return executor.StepInProgress, "hand_on", hand_on


def _wrong_weight() -> Mutation:
    run = CapturedStep.loss

    def loss(self: CapturedStep, index: int, weight: float, *args: Any) -> Any:
        return run(self, index, weight * (1.01 if index == 1 else 1.0), *args)

    return CapturedStep, "loss", loss


def _shared_not_summed() -> Mutation:
    def reduce(parameters: Any, group: Any, divide_by: int = 1) -> None:
        if divide_by != 1:
            reduce_gradients(parameters, group, divide_by)

    return parameters, "reduce_gradients", reduce


def _replicas_not_averaged() -> Mutation:
    return parameters, "reduce_gradients", lambda parameters, group, divide_by=1: reduce_gradients(parameters, group)


def _last_derivative_unread() -> Mutation:
    run = Stage.backward_force

    def backward_force(self: Stage, microbatch: int, boundary: Any, derivatives: list[Tensor], **more: Any) -> Any:
        return run(self, microbatch, boundary, [*derivatives[:-1], torch.zeros_like(derivatives[-1])], **more)

    return Stage, "backward_force", backward_force


def _gradients_lost(method: str, kind: type[Stage] = Stage) -> Mutation:
    """Throws away what a phase adds to the parameter gradients."""
    run = getattr(kind, method)

    def phase(self: Stage, *args: Any, **more: Any) -> Any:
        own, self._gradients = self._gradients, GradientBuffers()
        try:
            return run(self, *args, **more)
        finally:
            self._gradients = own

    return kind, method, phase


def _part_of_the_other_rank_lost() -> Mutation:
    run = Stage.backward_energy

    def backward_energy(self: Stage, *args: Any, force_part: Any = (), **more: Any) -> list[Tensor]:
        return run(self, *args, force_part=[torch.zeros_like(f) for f in force_part], **more)

    return Stage, "backward_energy", backward_energy


def _raw_backward(function: type, exchange: Callable[..., Tensor], factor: float = 1.0) -> Mutation:
    """Replaces a backward pass by one that is not differentiated again, or is scaled."""

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        (given,) = gradients
        if given is None:
            return None, None
        return (exchange(given, ctx.exchange) * factor if factor != 1 else exchange(given.detach(), ctx.exchange)), None

    return function, "backward", staticmethod(backward)


def _graph_ranks_not_summed() -> Mutation:
    return parameters, "reduce_gradients", lambda parameters, group, divide_by=1: reduce_gradients(parameters, group, 2)


MUTATIONS: dict[str, Callable[[], Mutation]] = {
    "unchanged": _unchanged,
    "second-order term cut": _no_second_order_term,
    "BF message zero": lambda: _scaled_message(Phase.BF, 0.0),
    "BE message off by a millionth": lambda: _scaled_message(Phase.BE, 1 + 1e-6),
    "weight of a micro-batch wrong": _wrong_weight,
    "shared gradients not summed": _shared_not_summed,
    "replicas summed instead of averaged": _replicas_not_averaged,
    "cotangent of the strain dropped": _last_derivative_unread,
    "WF lost": lambda: _gradients_lost("weight_force"),
    "WE lost": lambda: _gradients_lost("weight_energy"),
    "second copy not trained": lambda: _gradients_lost("backward_force", SplitStage),
    "part of the other rank lost": _part_of_the_other_rank_lost,
    "halo without second derivative": lambda: _raw_backward(collectives._GatherHalo, collectives.sum_halo),
    "halo scaled by the ranks": lambda: _raw_backward(collectives._GatherHalo, collectives.sum_halo, 2.0),
    "energies summed again": lambda: _raw_backward(collectives._SumOverRanks, collectives.sum_over_ranks, 1.0),
    "strain summed on one rank": lambda: _raw_backward(collectives._Replicate, collectives.replicate),
    "graph ranks averaged": _graph_ranks_not_summed,
}
