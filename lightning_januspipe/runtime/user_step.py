"""Runs the user's step around a captured potential: up to the potential's call, and from its results to the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import StepFunction, call_arguments
from lightning_januspipe.capture.find.in_step import step_with
from lightning_januspipe.capture.patches import patched
from lightning_januspipe.capture.side_effects import kept_metrics, metrics_of, silent_log
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trees import copied
from lightning_januspipe.engine.loss import LossLeaves, gradients_of_loss, loss_in, require_finite
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.random_state import random_state, seeded, set_random_state
from lightning_januspipe.runtime.changing_buffers import ChangingBuffers

Note = Callable[[StepFunction, tuple[Any, ...], dict[str, Any], Mapping[str, int]], None]


@dataclass(frozen=True)
class _Prepared:
    """Holds a micro-batch between the two runs of its step."""

    step: StepFunction
    batch: Any
    tensors: list[Tensor]
    seed: int
    after: Mapping[str, Any]


class CapturedStep:
    """Runs the user's step with the potential replaced: up to the potential, and later from its results to the loss.

    Args:
        staged: The potential in stages.
        module: The LightningModule.
        add_gradients: Called with the parameters outside the stages and their gradients. Every rank computes the same
            gradients, so only one rank of a pipeline may pass them on.
        note: Called with each call of the potential: the step, its arguments, and the values of its size symbols.

    Attributes:
        outside_parameters: Trainable parameters that the step reads outside the stages.
    """

    def __init__(
        self,
        staged: StagedPotential,
        module: nn.Module,
        add_gradients: Callable[[list[nn.Parameter], list[Tensor | None]], None],
        note: Note | None = None,
    ) -> None:
        self._staged, self._module, self._add, self._note = staged, module, add_gradients, note
        self._potential = module.get_submodule(staged.path)
        self._epilogue = staged.return_value(self._potential)
        self._inputs = staged.inputs(self._potential)
        named = dict(self._potential.named_parameters())
        inside = {named[name] for name, stages in staged.parameter_stages().items() if stages}
        others = [p for p in module.parameters() if p.requires_grad and p not in inside]
        read = [named[name] for name in staged.step_parameters if named[name].requires_grad]
        self.outside_parameters: list[nn.Parameter] = list(dict.fromkeys([*others, *self._epilogue.parameters, *read]))
        self._metrics = metrics_of(module)
        self._buffers = ChangingBuffers(self._potential)
        self._prepared: dict[int, _Prepared] = {}

    def prepare(self, index: int, step: StepFunction, batch: Any) -> MicrobatchInput:
        """Runs the step up to the potential, and returns what the stages get.

        Args:
            index: Index of the micro-batch.
            step: The user's step, from a batch to its output.
            batch: The micro-batch; the step gets a shallow copy.

        Raises:
            CaptureError: The step does not call the potential, or calls it with other constants or sizes than it was
                captured for.
        """
        # One number of the shared generator for each micro-batch: it goes on by as much on every rank, whatever the
        # step draws, and the step draws the same when it is run again.
        seed = int(torch.randint(2**31, ()).item())
        with seeded(seed), silent_log(self._module), kept_metrics(self._metrics), torch.enable_grad():
            in_step = self._staged.replaced is not None
            args, kwargs = call_arguments(self._module, self._staged.path, step, batch, in_step)
            tensors = self._inputs(args, kwargs)
            after = random_state(tensors[0].device)
        symbols = self._staged.bind_sizes(tensors)
        if self._note is not None:
            self._note(step, args, kwargs, symbols)
        self._prepared[index] = _Prepared(step, batch, tensors, seed, after)
        return MicrobatchInput(tensors, symbols)

    def loss(
        self, index: int, weight: float, observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> tuple[Any, LossGradients]:
        """Runs the whole step on energies and forces, and differentiates its loss.

        Args:
            index: Index of the micro-batch, which was prepared before.
            weight: Factor of this micro-batch's loss, with the factor of a gradient scaler.
            observables: Values of the potential that the loss reads.
            derivatives: Complete ∂E/∂x.

        Returns:
            The step's output, and the seeds of the backward passes.

        Raises:
            CaptureError: The loss does not depend on energy or forces.
            FloatingPointError: The loss is not finite.
        """
        leaves = LossLeaves(observables, derivatives)
        with self._buffers.in_loss(), torch.enable_grad():
            output = self.finish(index, leaves.observables, leaves.derivatives)
        name = type(self._module).__name__
        loss = loss_in(output, name)
        require_finite(loss, index)
        found: list[Tensor | None] = []
        num = len(leaves.inputs)
        if loss.requires_grad:
            found = gradients_of_loss(loss, weight, [*leaves.inputs, *self.outside_parameters])
            self._add(self.outside_parameters, found[num:])
        if all(gradient is None for gradient in found[:num]):
            raise CaptureError(
                f"the loss of {name} depends on no energy and no derivative of the potential, so nothing can be "
                "trained. Look for a detach(), a no_grad(), or a loss that reads other values than the potential "
                "returns."
            )
        return output, leaves.seeds(found[:num])

    def finish(self, index: int, observables: Sequence[Tensor], derivatives: Sequence[Tensor]) -> Any:
        """Runs the whole step on energies and forces, and returns its output."""
        prepared = self._prepared.pop(index)

        def value_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # The forward has drawn its random numbers; a step that differentiates by itself draws them before.
            if self._staged.replaced is None:
                set_random_state(prepared.after, prepared.tensors[0].device)
            with self._buffers.as_read_by_phases():
                value = self._epilogue(prepared.tensors, observables, derivatives)
            return self._epilogue.for_step(args, kwargs, value)

        with seeded(prepared.seed):
            if self._staged.replaced is None:
                with patched(self._potential, "forward", lambda *args, **kwargs: value_for(args, kwargs)):
                    return prepared.step(copied(prepared.batch))
            with step_with(self._module, self._staged.replaced, *value_for((prepared.batch,), {})):
                return prepared.step(copied(prepared.batch))

    def end(self) -> None:
        """Ends an optimizer step, or a part of it whose gradients are accumulated, after all of its phases."""
        self._buffers.end_step()

    def clear(self) -> None:
        """Forgets prepared micro-batches, and what losses have changed in a step that did not end."""
        self._prepared.clear()
        self._buffers.clear()


def with_batch(step: Callable[..., Any]) -> Callable[[Any], Any]:
    """Returns a step of the user as a function of the batch alone; indices are given by position, as in Lightning."""
    following = list(inspect.signature(step).parameters.values())[1:3]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    indices = [
        0
        for p in following
        if p.kind is inspect.Parameter.VAR_POSITIONAL
        or (p.kind in positional and (p.default is p.empty or p.name in ("batch_idx", "dataloader_idx")))
    ]
    return lambda batch: step(batch, *indices)
