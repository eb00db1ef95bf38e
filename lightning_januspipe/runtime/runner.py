"""Defines what the strategy, callbacks and checkpoints need from one rank's part of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lightning_januspipe.capture.find.grad_call import StepFunction
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.runtime.step_recorder import RecordedStep, StepRecorder
from lightning_januspipe.schedule.state_actions import ShardLevel


class Runner(ABC):
    """Runs the training and evaluation steps of one rank.

    There are two: :class:`~lightning_januspipe.runtime.pipeline.Pipeline`, and
    :class:`~lightning_januspipe.runtime.single_stage.SingleStage` where each rank works on samples of its own.

    Args:
        parameters: The module's parameters, with the ranks that train them.
        mesh: This rank's process groups.

    Attributes:
        parameters: See above.
        gradients: The parameter gradients of the present step, before they are accumulated into ``.grad``.
        shard_level: What the ranks that hold the same stages share in training; see :meth:`share_state`.
        step_recorder: Records times and memory of single steps.
        is_staged: Whether the potential is cut into stages, so that phases are known. If not, a micro-batch is one
            action.
        placement: The rank of each stage.
    """

    is_staged: bool
    placement: tuple[int, ...]

    def __init__(self, parameters: PlacedParameters, mesh: Mesh) -> None:
        self.parameters = parameters
        self.gradients = parameters.sums
        self.shard_level: ShardLevel = "none"
        self.step_recorder = StepRecorder(mesh.device, parameters.gradient_tensors)

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain of stages."""
        return len(self.placement)

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Returns the bytes that this rank's stages have sent to other ranks so far."""

    @abstractmethod
    def train_step(
        self,
        steps: Sequence[StepFunction],
        batches: Sequence[Any],
        loss_scale: float = 1.0,
        owners: Sequence[Tensor | None] = (),
        reduces: bool = True,
    ) -> list[Any]:
        """Runs the forward and backward passes of all micro-batches; the gradients end in :attr:`gradients`.

        Args:
            steps: The user's training step for each micro-batch, from a batch to what it returns.
            batches: The micro-batches.
            loss_scale: The factor of a gradient scaler, which multiplies every loss.
            owners: For graph ranks, the rank that owns each atom of each micro-batch, where the loader chose it.
            reduces: Whether the optimizer steps after this step; if not, gradients are accumulated.

        Returns:
            What the steps returned.

        Raises:
            FloatingPointError: A loss is not finite, before it is scaled.
            PipelineError: The ranks of a pipeline hold different batches, or one of them has ended.
        """

    def share_state(self, level: ShardLevel) -> None:
        """Lets steps change the state that the ranks that hold the same stages share, once optimizers are in shards."""
        self.shard_level = level

    @abstractmethod
    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """Runs the user's evaluation step on a batch, and returns its output."""

    def record_next_step(self) -> None:
        """Asks for a recording of the next training step; all ranks of the pipeline have to be asked."""
        self.step_recorder.ask()

    @abstractmethod
    def recorded_step(self) -> RecordedStep | None:
        """Returns the last step that was recorded, None if there is none or no schedule to compare it with.

        All ranks of the pipeline have to call this.
        """

    @abstractmethod
    def fetch_parameters_with(
        self, whole: Callable[[], AbstractContextManager[Any]], gradient_bytes: float | None = None
    ) -> None:
        """Tells where to get the values of parameters that have left this rank's memory.

        Args:
            whole: A context in which the module has all parameters, on each rank of a pipeline or on the first only;
                all of them enter it.
            gradient_bytes: See :class:`~lightning_januspipe.capture.validate.against_eager.PhaseMode`.
        """
