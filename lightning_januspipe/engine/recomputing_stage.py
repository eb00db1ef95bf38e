"""Runs the phases of one stage eagerly and keeps nothing between them but what the stages send each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_januspipe.engine.autocast import OFF, Autocast
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage


@dataclass
class _Received:
    """Keeps what has arrived for one micro-batch: its tensors, and h_in, ∂E/∂h_out, u_in and v."""

    tensors: Sequence[Any]
    boundary: Sequence[Tensor]
    boundary_gradients: Sequence[Tensor | None] = ()
    boundary_cotangents: Sequence[Tensor] = ()
    derivative_cotangents: Sequence[Tensor] = ()


class RecomputingStage(Stage):
    """Runs each phase from what the stage has received, and computes the phases before it again.

    FF computes FE again, BF computes FE and FF, and BE computes all of them. BF finds only what it sends; BE finds all
    parameter gradients at once, so WF and WE have nothing to do.

    Args: See :class:`~.stage.Stage`.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers, autocast: Autocast = OFF) -> None:
        super().__init__(function, gradients, autocast)
        self._received: dict[int, _Received] = {}

    @property
    def num_inflight(self) -> int:
        """Returns the number of micro-batches between their first and their last phase here."""
        return len(self._received)

    def clear(self) -> None:
        """Forgets all micro-batches, after an error or an evaluation."""
        self._received.clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE; see :meth:`.Stage.forward_energy`."""
        self._received[microbatch] = _Received(tensors, boundary)
        return Stage(self.function, self._gradients, self._autocast).forward_energy(microbatch, tensors, boundary)

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF; see :meth:`.Stage.forward_force`."""
        received = self._received[microbatch]
        received.boundary_gradients = boundary_gradients
        stage = self._after_energy(microbatch)
        if not create_graph:
            del self._received[microbatch]
        return stage.forward_force(microbatch, boundary_gradients, create_graph=False)

    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Finds what BF sends; see :meth:`.Stage.backward_force`."""
        received = self._received[microbatch]
        received.boundary_cotangents, received.derivative_cotangents = boundary_cotangents, derivative_cotangents
        if not self.function.boundary_out:
            return [], []
        stage = self._after_force(microbatch)
        return stage.seed_cotangents(microbatch, boundary_cotangents, derivative_cotangents), []

    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor | None],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        force_part: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Runs BF and BE, with all parameter gradients; see :meth:`.Stage.backward_energy`."""
        stage = self._after_force(microbatch)
        received = self._received.pop(microbatch)
        stage.backward_force(microbatch, received.boundary_cotangents, received.derivative_cotangents)
        return stage.backward_energy(microbatch, boundary_cotangents, observable_cotangents)

    def weight_force(self, microbatch: int) -> None:
        """Does nothing: BE finds these gradients."""

    def weight_energy(self, microbatch: int) -> None:
        """Does nothing: BE has found these gradients."""

    def _after_energy(self, microbatch: int) -> Stage:
        """Returns a stage that has run FE."""
        received = self._received[microbatch]
        stage = Stage(self.function, self._gradients, self._autocast)
        stage.forward_energy(microbatch, received.tensors, received.boundary)
        return stage

    def _after_force(self, microbatch: int) -> Stage:
        """Returns a stage that has run FE and FF."""
        stage = self._after_energy(microbatch)
        stage.forward_force(microbatch, self._received[microbatch].boundary_gradients)
        return stage


def recomputing_stage(function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
    """Returns a stage that keeps boundaries only."""
    return RecomputingStage(function, gradients, chain.autocast)
