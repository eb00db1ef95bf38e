"""Runs the user's step as it is, where ranks share nothing but gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import StepFunction
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.loss import gradients_of_loss, loss_in, require_finite
from lightning_januspipe.mesh import Mesh, as_world
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.runtime.runner import Runner
from lightning_januspipe.schedule import Action, Phase


class SingleStage(Runner):
    """Trains the whole module on one rank: gradient accumulation over the micro-batches, nothing captured.

    Args:
        module: The LightningModule.
        mesh: This rank's process groups.
    """

    is_staged = False
    placement = (0,)
    bytes_sent = 0

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        super().__init__(PlacedParameters(module, mesh, {}), mesh)
        self._module, self._mesh = module, mesh

    def train_step(
        self,
        steps: Sequence[StepFunction],
        batches: Sequence[Any],
        loss_scale: float = 1.0,
        owners: Sequence[Tensor | None] = (),
        reduces: bool = True,
    ) -> list[Any]:
        """Runs the user's step on every micro-batch, one after the other; see :meth:`.Runner.train_step`."""
        outputs = []
        if self.shard_level != "none":
            self.parameters.require_same_trained()
        self.parameters.make_whole()
        with self.step_recorder.step() as recorder:
            for index, (step, batch) in enumerate(zip(steps, batches, strict=True)):
                whole = Action(Phase.FE, 0, index)
                if recorder is not None:
                    recorder.start(whole)
                outputs.append(self._microbatch(index, step, batch, loss_scale / len(batches)))
                if recorder is not None:
                    recorder.end(whole)
        if reduces and self.shard_level != "none":
            self.parameters.reshard()
            self.parameters.reduce(0)
        return outputs

    def _microbatch(self, index: int, step: StepFunction, batch: Any, scale: float) -> Any:
        group = self._mesh.data_group
        with as_world(group), waiting("collective in training_step", group, mixed=True):
            output = step(batch)
        loss = loss_in(output, type(self._module).__name__)
        require_finite(loss, index)
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        self.gradients.add(parameters, gradients_of_loss(loss, scale, list(parameters)))
        return output

    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """Runs the user's evaluation step."""
        group = self._mesh.data_group
        with as_world(group), waiting("collective in a step of evaluation", group, mixed=True):
            return step(batch)

    def recorded_step(self) -> None:
        """Returns None: without stages there is no schedule to compare a step with."""

    def fetch_parameters_with(
        self, whole: Callable[[], AbstractContextManager[Any]], gradient_bytes: float | None = None
    ) -> None:
        """Does nothing: all parameters stay."""
