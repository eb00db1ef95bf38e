"""Runs the phases of one stage eagerly, and keeps what autograd saves between them in host memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_januspipe.engine.autocast import OFF, Autocast
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.host_memory import KeptTensor, KeptValues
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Phase

_OF_ENERGY = (Phase.FF, Phase.BF, Phase.BE, Phase.WF, Phase.WE)
_OF_FORCE = (Phase.BF, Phase.WF)
"""The phases that read what autograd saves in FE and in FF."""


class OffloadingStage(Stage):
    """Runs the phases of :class:`~.stage.Stage`, with the tensors that autograd saves on the host between them.

    What stages send each other stays on the device, and so do the gradients that deferred phases start from.

    Args: See :class:`~.stage.Stage`.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers, autocast: Autocast = OFF) -> None:
        super().__init__(function, gradients, autocast)
        self._kept: dict[int, KeptValues] = {}

    def clear(self) -> None:
        """Forgets all micro-batches, after an error or an evaluation."""
        self._kept.clear()
        super().clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE; see :meth:`.Stage.forward_energy`."""
        given = [t for t in (*tensors, *boundary, *self.function.parameters) if isinstance(t, Tensor)]
        self._kept[microbatch] = KeptValues(given)
        with self._saving(microbatch, _OF_ENERGY):
            return super().forward_energy(microbatch, tensors, boundary)

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF; see :meth:`.Stage.forward_force`."""
        with self._saving(microbatch, _OF_FORCE):
            found = super().forward_force(microbatch, boundary_gradients, create_graph=create_graph)
        if not create_graph:
            del self._kept[microbatch]
        return found

    def fetch(self, microbatch: int, phase: Phase) -> None:
        """Starts to bring back what a phase reads; see :meth:`.Stage.fetch`."""
        if microbatch in self._kept:
            self._kept[microbatch].fetch(phase)

    def to_host(self, microbatch: int, following: Phase | None) -> None:
        """Moves saved tensors to the host; see :meth:`.Stage.to_host`."""
        if microbatch not in self._inflight:
            self._kept.pop(microbatch, None)
        elif microbatch in self._kept:
            self._kept[microbatch].to_host(following)

    def host_tensors(self) -> list[Tensor]:
        """Returns what is on the host; see :meth:`.Stage.host_tensors`."""
        return [tensor for kept in self._kept.values() for tensor in kept.host_tensors()]

    def _saving(self, microbatch: int, readers: Collection[Phase]) -> torch.autograd.graph.saved_tensors_hooks:
        """Returns a context in which autograd saves through :class:`.KeptValues`."""
        kept = self._kept[microbatch]

        def pack(tensor: Tensor) -> Tensor | KeptTensor:
            return kept.add(tensor, readers) or tensor

        def unpack(saved: Tensor | KeptTensor) -> Tensor:
            return saved.tensor() if isinstance(saved, KeptTensor) else saved

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def offloading_stage(function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
    """Returns a stage that keeps on the host what autograd saves."""
    return OffloadingStage(function, gradients, chain.autocast)
