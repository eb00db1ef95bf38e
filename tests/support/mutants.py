"""Modules that break the pipeline they are trained in, each in one way, for as long as their training lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import tiny
import torch
from torch import Tensor

from lightning_januspipe import pipeline
from lightning_januspipe.capture.step import CapturedStep
from lightning_januspipe.engine import executor
from lightning_januspipe.engine.gradients import reduce_gradients
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Phase


def tied_module() -> Any:
    """Three layers, of which the first and the last share weights, so that two stages read them."""
    module = tiny.module(num_layers=3)
    first, _, last = module.potential.energy_model.layers
    last.self_connection = first.self_connection
    last.radial_network.linears[1] = first.radial_network.linears[1]
    return module


def mutated(name: str, at: str) -> Any:
    """The module with tied weights, and a fault until its teardown.

    Args:
        name: of the fault.
        at: hook of the module that installs it; the potential is captured after ``on_train_start``.
    """
    module = tied_module()
    target, attribute, replacement = MUTATIONS[name]()
    fault = patch.object(target, attribute, replacement)
    setattr(module, at, lambda *_: fault.start())
    module.teardown = lambda stage: fault.stop()
    return module


def data() -> Any:
    """A few small structures; two batches."""
    return tiny.data(num_train=12, batch_size=6)


Mutation = tuple[Any, str, Callable[..., Any]]


def _unchanged() -> Mutation:
    run = Stage.backward_force
    return Stage, "backward_force", lambda self, *args: run(self, *args)


def _no_second_order_term() -> Mutation:
    run = Stage.backward_force

    def backward_force(self: Stage, microbatch: int, *args: Any) -> list[Tensor]:
        sent = run(self, microbatch, *args)
        self._inflight[microbatch].entering = []
        return sent

    return Stage, "backward_force", backward_force


def _scaled_message(phase: Phase, factor: float) -> Mutation:
    run = executor._Step._send

    def send(self: Any, action: Any, channel: Any, tensors: list[Tensor]) -> None:
        if action.phase is phase:
            down = phase in (Phase.FE, Phase.BF)
            function = self._executor.stage.function
            num = len(function.boundary_out if down else function.boundary_in)
            tensors = [t * factor if t.is_floating_point() else t for t in tensors[:num]] + tensors[num:]
        run(self, action, channel, tensors)

    return executor._Step, "_send", send


def _wrong_weight() -> Mutation:
    run = CapturedStep.loss

    def loss(self: CapturedStep, index: int, step: Any, batch: Any, weight: float, *args: Any) -> Any:
        return run(self, index, step, batch, weight * (1.01 if index == 1 else 1.0), *args)

    return CapturedStep, "loss", loss


def _shared_not_summed() -> Mutation:
    def reduce(parameters: Any, group: Any, divide_by: int = 1) -> None:
        if divide_by != 1:
            reduce_gradients(parameters, group, divide_by)

    return pipeline, "reduce_gradients", reduce


def _replicas_not_averaged() -> Mutation:
    return pipeline, "reduce_gradients", lambda parameters, group, divide_by=1: reduce_gradients(parameters, group)


def _last_derivative_unread() -> Mutation:
    run = Stage.backward_force

    def backward_force(self: Stage, microbatch: int, boundary: Any, derivatives: list[Tensor]) -> list[Tensor]:
        return run(self, microbatch, boundary, [*derivatives[:-1], torch.zeros_like(derivatives[-1])])

    return Stage, "backward_force", backward_force


MUTATIONS: dict[str, Callable[[], Mutation]] = {
    "unchanged": _unchanged,
    "second-order term cut": _no_second_order_term,
    "BF message zero": lambda: _scaled_message(Phase.BF, 0.0),
    "BE message off by a millionth": lambda: _scaled_message(Phase.BE, 1 + 1e-6),
    "weight of a micro-batch wrong": _wrong_weight,
    "shared gradients not summed": _shared_not_summed,
    "replicas summed instead of averaged": _replicas_not_averaged,
    "cotangent of the strain dropped": _last_derivative_unread,
}
