"""Runs the phases of one micro-batch through stages of a toy chain, and counts their matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import loss_gradients

from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.engine.stage import Stage


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class Walk:
    """One micro-batch on its way through the phases of all stages."""

    def __init__(self, stages: list[Stage], index: int, tensors: list[Tensor], defer: bool = False) -> None:
        self._stages, self._index, self._tensors, self._defer = stages, index, tensors, defer
        self._observables: list[Tensor] = []
        self._derivatives = [torch.zeros_like(tensors[0]), torch.zeros_like(tensors[4])]
        self._message: list[Tensor] = []
        self._seeds: LossGradients | None = None

    def evaluate_loss(self) -> None:
        """Between FF and BF."""
        self._seeds = self._seeds or loss_gradients(self._observables, self._derivatives)

    def run(self, phase: str) -> list[int]:
        """One phase of all stages; gives the number of matrix products of each."""
        self._message = []
        counts = {}
        for stage in self._stages if phase in ("FE", "BF", "WF", "WE") else reversed(self._stages):
            with Products() as products:
                self._run(phase, stage)
            counts[stage.function.index] = products.count
        return [counts[i] for i in sorted(counts)]

    def _run(self, phase: str, stage: Stage) -> None:
        if phase == "FE":
            self._message, found = stage.forward_energy(self._index, self._tensors, self._message)
            self._observables += found
        elif phase == "FF":
            self._message, parts = stage.forward_force(self._index, self._message)
            self._derivatives = [a + b for a, b in zip(self._derivatives, parts, strict=True)]
        elif phase == "BF":
            self.evaluate_loss()
            assert self._seeds is not None
            self._message, _ = stage.backward_force(
                self._index, self._message, self._seeds.derivatives, defer=self._defer
            )
        elif phase == "BE":
            assert self._seeds is not None
            own = [self._seeds.observables[i] for i in stage.function.observables]
            self._message = stage.backward_energy(self._index, self._message, own, defer=self._defer)
        elif phase == "WF":
            stage.weight_force(self._index)
        else:
            stage.weight_energy(self._index)
