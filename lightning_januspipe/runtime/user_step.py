"""The user's step around a captured potential: up to its call of the potential, and from its result to the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import StepFunction, call_arguments
from lightning_januspipe.capture.find.in_step import step_with
from lightning_januspipe.capture.patches import forward_replaced
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trees import shallow_copy
from lightning_januspipe.capture.validate.side_effects import kept_metrics, metrics_of, silent_log
from lightning_januspipe.engine.loss import LossLeaves, gradients_of_loss, loss_in, require_finite
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.random_state import seeded

Note = Callable[[StepFunction, tuple[Any, ...], dict[str, Any], Mapping[str, int]], None]


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch's step gave.

    Attributes:
        output: what the user's step returned.
        gradients: what the phases need.
    """

    output: Any
    gradients: LossGradients


class CapturedStep:
    """Runs the user's step with the potential replaced.

    Args:
        captured: the captured potential.
        module: the LightningModule.
        add_gradients: called with the parameters outside the stages and their gradients. Every rank computes the same
            ones, so only one rank of a pipeline may pass them on.
        note: called with each call of the potential: the step, its arguments, and the values of its size symbols.
    """

    def __init__(
        self,
        captured: StagedPotential,
        module: nn.Module,
        add_gradients: Callable[[list[nn.Parameter], list[Tensor | None]], None],
        note: Note | None = None,
    ) -> None:
        self._captured, self._module, self._add, self._note = captured, module, add_gradients, note
        self._potential = module.get_submodule(captured.path)
        self._epilogue = captured.return_value(self._potential)
        self._inputs = captured.inputs(self._potential)
        named = dict(self._potential.named_parameters())
        inside = {named[name] for name, stages in captured.parameter_stages().items() if stages}
        others = [p for p in module.parameters() if p.requires_grad and p not in inside]
        read = [named[name] for name in captured.step_parameters if named[name].requires_grad]
        self.outside_parameters: list[nn.Parameter] = list(dict.fromkeys([*others, *self._epilogue.parameters, *read]))
        self._metrics = metrics_of(module)
        self._calls: dict[int, list[Tensor]] = {}
        self._seeds: dict[int, int] = {}

    def prepare(self, index: int, step: StepFunction, batch: Any) -> MicrobatchInput:
        """Run the step up to the potential, and return what the stages get.

        Args:
            index: the micro-batch.
            step: the user's step, from a batch to its output.
            batch: the micro-batch's batch; the step gets a shallow copy.

        Raises:
            CaptureError: the step does not call the potential, or calls it with other constants or sizes than it was
                traced for.
        """
        # One number of the shared generator for each micro-batch: it goes on by as much on every rank, whatever the
        # step draws, and the step draws the same when it is run again.
        seed = int(torch.randint(2**31, ()).item())
        with seeded(seed), silent_log(self._module), kept_metrics(self._metrics), torch.enable_grad():
            in_step = self._captured.replaced is not None
            args, kwargs = call_arguments(self._module, self._captured.path, step, batch, in_step)
            tensors = self._inputs(args, kwargs)
        symbols = self._captured.bind_sizes(tensors)
        if self._note is not None:
            self._note(step, args, kwargs, symbols)
        self._calls[index], self._seeds[index] = tensors, seed
        return MicrobatchInput(tensors, symbols)

    def loss(
        self,
        index: int,
        step: StepFunction,
        batch: Any,
        weight: float,
        observables: list[Tensor],
        derivatives: list[Tensor],
    ) -> StepResult:
        """Run the whole step on energies and forces, and differentiate its loss.

        Args:
            index: the micro-batch, prepared before.
            step: the user's step.
            batch: its batch.
            weight: factor of this micro-batch's loss, with that of a gradient scaler.
            observables: values of the potential that the loss reads.
            derivatives: complete ∂E/∂x.

        Raises:
            CaptureError: the loss does not depend on energy or forces.
            FloatingPointError: the loss is not finite.
        """
        leaves = LossLeaves(observables, derivatives)
        with torch.enable_grad():
            output = self._replay(index, step, batch, leaves.observables, leaves.derivatives)
        loss = loss_in(output, type(self._module).__name__)
        require_finite(loss, index)
        found: list[Tensor | None] = []
        num = len(leaves.inputs)
        if loss.requires_grad:
            found = gradients_of_loss(loss, weight, [*leaves.inputs, *self.outside_parameters])
            self._add(self.outside_parameters, found[num:])
        if all(gradient is None for gradient in found[:num]):
            raise CaptureError(_UNTRAINED.format(type(self._module).__name__))
        return StepResult(output, leaves.seeds(found[:num]))

    def finish(
        self, index: int, step: StepFunction, batch: Any, observables: list[Tensor], derivatives: list[Tensor]
    ) -> Any:
        """Run a step of evaluation on energies and forces, and return its output."""
        return self._replay(index, step, batch, observables, derivatives)

    def clear(self) -> None:
        """Forget prepared micro-batches."""
        self._calls.clear()
        self._seeds.clear()

    def _replay(self, index: int, step: StepFunction, batch: Any, y: list[Tensor], x: list[Tensor]) -> Any:
        tensors = self._calls.pop(index)

        def replaced(*args: Any, **kwargs: Any) -> object:
            return self._epilogue.for_step(args, kwargs, self._epilogue(tensors, y, x))

        with seeded(self._seeds.pop(index)):
            if self._captured.replaced is None:
                with forward_replaced(self._potential, replaced):
                    return step(shallow_copy(batch))
            derivatives, outputs = self._epilogue.for_step((batch,), {}, self._epilogue(tensors, y, x))
            with step_with(self._module, derivatives, outputs):
                return step(shallow_copy(batch))


_UNTRAINED = (
    "the loss of {0} depends on no energy and no derivative of the potential, so nothing can be trained. Look for a "
    "detach(), a no_grad(), or a loss that reads other values than the potential returns."
)


def with_batch(step: Callable[..., Any]) -> Callable[[Any], Any]:
    """A step of the user as a function of the batch alone; indices are given by position, as Lightning does."""
    following = list(inspect.signature(step).parameters.values())[1:3]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    indices = [
        0
        for p in following
        if p.kind is inspect.Parameter.VAR_POSITIONAL
        or (p.kind in positional and (p.default is p.empty or p.name in ("batch_idx", "dataloader_idx")))
    ]
    return lambda batch: step(batch, *indices)
