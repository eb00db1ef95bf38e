"""What stands for a pipeline where there is one stage and nobody shares atoms: the user's step as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import StepFunction
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.loss import gradients_of_loss, loss_in, require_finite
from lightning_januspipe.mesh import Mesh, as_world
from lightning_januspipe.runtime.step_recorder import StepRecorder
from lightning_januspipe.schedule import Action, Phase


class SingleStage:
    """The whole module on one rank: gradient accumulation over the micro-batches, nothing captured.

    Args:
        module: the LightningModule.
        mesh: this rank's process groups.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.gradients = GradientBuffers()
        self._module, self._mesh = module, mesh
        self.step_recorder = StepRecorder(mesh.device, self.gradients)

    def train_step(
        self,
        steps: Sequence[StepFunction],
        batches: Sequence[Any],
        loss_scale: float = 1.0,
        ahead: Sequence[Tensor | None] = (),
    ) -> list[Any]:
        """Run the user's step on every micro-batch; gradients end in ``gradients``.

        Args:
            steps: the user's training step for each micro-batch, from a batch to what it returns.
            batches: the micro-batches.
            loss_scale: of a gradient scaler: what the gradients are multiplied by, from the losses on.
            ahead: for graph ranks, owners of the atoms of each micro-batch, where the loader has chosen them.

        Returns:
            What the steps returned.

        Raises:
            FloatingPointError: a loss is not finite, before it is scaled.
        """
        outputs = []
        with self.step_recorder.step() as recorder:
            for index, (step, batch) in enumerate(zip(steps, batches, strict=True)):
                whole = Action(Phase.FE, 0, index)
                if recorder is not None:
                    recorder.start(whole)
                outputs.append(self._microbatch(index, step, batch, loss_scale / len(batches)))
                if recorder is not None:
                    recorder.end(whole)
        return outputs

    def _microbatch(self, index: int, step: StepFunction, batch: Any, scale: float) -> Any:
        with as_world(self._mesh.data_group):
            output = step(batch)
        loss = loss_in(output, type(self._module).__name__)
        require_finite(loss, index)
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        self.gradients.add(parameters, gradients_of_loss(loss, scale, list(parameters)))
        return output

    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """The user's step of evaluation."""
        with as_world(self._mesh.data_group):
            return step(batch)

    def reduce(self) -> None:
        """Average ``p.grad`` over the replicas."""
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            reduce_gradients(self._module.parameters(), self._mesh.data_group, divide_by=self._mesh.shape.data)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this rank trains a parameter: all of them."""
        return True

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts a parameter in norms and checkpoints: all of them."""
        return True
