"""The user's step around a captured potential: up to its call of the potential, and from its result to the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_januspipe.capture.containers import shallow_copy
from lightning_januspipe.capture.divided import DividedPotential
from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.find import StepFunction, call_arguments
from lightning_januspipe.capture.instep import forward_replaced, step_with
from lightning_januspipe.engine.autocast import OFF, autocast_as, forget_casts
from lightning_januspipe.engine.executor import LossGradients, MicrobatchInput

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
        captured: DividedPotential,
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
        with _seeded(seed), silent_log(self._module), kept_metrics(self._metrics), torch.enable_grad():
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
        y = [v.detach().requires_grad_(v.is_floating_point()) for v in observables]
        x = [d.detach().requires_grad_() for d in derivatives]
        with torch.enable_grad():
            output = self._replay(index, step, batch, y, x)
        loss = loss_of(output, type(self._module).__name__)
        require_finite(loss, index)
        inputs = [v for v in (*y, *x) if v.requires_grad]
        if not loss.requires_grad:
            raise CaptureError(_UNTRAINED.format(type(self._module).__name__))
        found = gradients_of_loss(loss, weight, [*inputs, *self.outside_parameters])
        self._add(self.outside_parameters, list(found[len(inputs) :]))
        given = iter(found[: len(inputs)])
        seeds = [next(given) if v.requires_grad else None for v in (*y, *x)]
        if all(s is None for s in seeds):
            raise CaptureError(_UNTRAINED.format(type(self._module).__name__))
        tangents = [torch.zeros_like(d) if s is None else s for s, d in zip(seeds[len(y) :], x, strict=True)]
        return StepResult(output, LossGradients(seeds[: len(y)], tangents))

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

        with _seeded(self._seeds.pop(index)):
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


def loss_of(output: Any, name: str) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        CaptureError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise CaptureError(
            f"training_step of {name} returned {type(output).__name__}; expected a loss (a tensor with one number), or "
            "a dict with the key 'loss'. Skipping a step by returning None is not possible in a pipeline."
        )
    return loss


def gradients_of_loss(loss: Tensor, weight: float, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a weighted loss, as a Trainer's backward pass has them: outside autocast.

    Args:
        loss: of one micro-batch.
        weight: its factor. A loss in half precision is weighted in float32, where the factor of a gradient scaler fits.
        inputs: what to differentiate with respect to; None is returned for those that the loss does not depend on.
    """
    with autocast_as(OFF):
        weighted = (loss.float() if loss.dtype == torch.float16 else loss) * weight
        found = torch.autograd.grad(weighted, inputs, allow_unused=True)
    forget_casts()
    return list(found)


def require_finite(loss: Tensor, index: int) -> None:
    """Refuse a loss that is NaN or infinite: every parameter would be lost with the next optimizer step.

    Raises:
        FloatingPointError: it is.
    """
    if not bool(torch.isfinite(loss.detach()).all()):
        raise FloatingPointError(
            f"the loss of micro-batch {index} is {loss.detach().item()}. Look at the batch's labels and structures "
            "(overlapping atoms, missing labels), or lower the learning rate."
        )


@contextmanager
def silent_log(module: nn.Module) -> Iterator[None]:
    """Nothing is logged inside the block: its step is run again later."""

    def log(*_: Any, **__: Any) -> None: ...

    with replaced_log(module, log):
        yield


@contextmanager
def replaced_log(module: nn.Module, log: Callable[..., None]) -> Iterator[None]:
    """Send the module's ``self.log`` (and so ``self.log_dict``) elsewhere."""
    own = module.__dict__.get("log")
    module.log = log  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del module.log
        else:
            module.log = own


def metrics_of(module: nn.Module) -> list[Any]:
    """The metrics of torchmetrics in a module."""
    return [m for m in module.modules() if hasattr(m, "_copy_state_dict") and hasattr(m, "_update_count")]


@contextmanager
def kept_metrics(metrics: Sequence[Any]) -> Iterator[None]:
    """Metrics that are updated or reset inside the block are as before after it."""
    kept = [_metric_state(m) for m in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            if metric._update_count != state["_update_count"]:
                metric.__dict__.update(state)


def _metric_state(metric: Any) -> dict[str, Any]:
    """A metric's states and counters; of lists the entries, which are not changed in place."""
    state = {n: getattr(metric, n) for n in (*metric._defaults, "_update_count", "_computed", "_forward_cache")}
    return {n: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v for n, v in state.items()}


class RandomState:
    """States of the generators of torch, numpy and Python."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn inside the block is as if it had not been drawn."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from generators with a seed of their own."""
    with kept_random_state():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
