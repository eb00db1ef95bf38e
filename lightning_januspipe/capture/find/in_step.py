"""Handles steps that differentiate energies themselves: ``self.model(batch)``, then ``torch.autograd.grad``.

The step up to its last such call stands for the potential; the last call may be inside of a submodule. When the step
runs for its loss, its submodules return what the stages computed, and ``torch.autograd.grad`` returns the derivatives
that the stages computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.find.grad_call import (
    PotentialCall,
    ReplacedCalls,
    StepFunction,
    as_sequence,
    grad_arguments,
)
from lightning_januspipe.capture.patches import module_hooks, patched
from lightning_januspipe.errors import CaptureError

_SAME_COORDINATES = (
    "Training and evaluation steps have to differentiate with respect to the same coordinates, in one order: where "
    "validation predicts a stress, let training predict it too, or leave it out of validation."
)


class StepPotential(nn.Module):
    """Runs a step up to its last derivative as its forward, with the parameters of the LightningModule.

    Args:
        module: the LightningModule.
        step: its step, from a batch to what it returns.
        replaced: the calls that return what it computes.
    """

    def __init__(self, module: nn.Module, step: StepFunction, replaced: ReplacedCalls) -> None:
        super().__init__()
        self._run, self._replaced = step, replaced
        self._owner = [module]  # in a list, so that it is no submodule of this one
        # The same dicts, so that parameters have the names that they have in the LightningModule.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Tells whether the LightningModule is in training mode."""
        owner = self.__dict__.get("_owner")
        return owner[0].training if owner else True

    @training.setter
    def training(self, mode: bool) -> None:
        if "_owner" in self.__dict__:
            self._owner[0].training = mode

    def forward(self, batch: Any) -> tuple[list[Tensor], dict[str, Any]]:
        """Returns the derivatives, and the outputs of the submodules by name."""
        names = self._replaced.submodules
        # Looked up here, as a trace may put other modules into the places of these.
        observer = _Observer({n: self._owner[0].get_submodule(n) for n in names}, self._replaced.num_inputs)
        with module_hooks(observer.enter, observer.leave):
            try:
                with observer:
                    self._run(batch)
            except _AllComputed:
                pass
        if observer.is_done:
            return observer.derivatives, {name: observer.outputs[name] for name in names}
        missing = [name for name in names if name not in observer.outputs]
        if missing:
            raise CaptureError(f"the step did not call {missing[0]!r} for this batch; every batch has to go through it")
        raise CaptureError(
            f"the step of {type(self._owner[0]).__name__} calls torch.autograd.grad for some batches only; it "
            "has to call it for every batch"
        )


class _AllComputed(Exception):
    """Unwinds the step after its last derivative."""


class _Observer(TorchFunctionMode):
    """Keeps what the replaced submodules return and the derivatives that the step asks for, and stops after the last.

    The step is not stopped inside of a module, as torch's trace would lose its place in the tree of modules.

    Args:
        replaced: the submodules by name.
        num_inputs: see :class:`~lightning_januspipe.capture.find.grad_call.ReplacedCalls`.
    """

    def __init__(self, replaced: Mapping[str, nn.Module], num_inputs: Sequence[int]) -> None:
        super().__init__()
        self._names = {submodule: name for name, submodule in replaced.items()}
        self._num_inputs = list(num_inputs)
        self._running: list[nn.Module] = []
        self.derivatives: list[Tensor] = []
        self.outputs: dict[str, Any] = {}

    @property
    def is_done(self) -> bool:
        """Tells whether nothing is missing."""
        return not self._num_inputs and len(self.outputs) == len(self._names)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs before the forward of every module."""
        self._running.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Runs after the forward of every module."""
        self._running.pop()
        if module in self._names:
            self.outputs[self._names[module]] = output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_done and not self._running:
            raise _AllComputed
        result = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad and not any(m in self._names for m in self._running):
            inputs = as_sequence(grad_arguments(args, kwargs or {})["inputs"])
            if len(inputs) != (expected := self._num_inputs.pop(0)):
                raise CaptureError(
                    f"the step differentiates with respect to {len(inputs)} tensors of shapes "
                    f"{[tuple(x.shape) for x in inputs]}; it was captured with {expected}. {_SAME_COORDINATES}"
                )
            self.derivatives += [torch.zeros_like(x) if g is None else g for g, x in zip(result, inputs, strict=True)]
            if self.is_done and not self._running:
                raise _AllComputed
        return result


class _GiveGrad(TorchFunctionMode):
    """Answers each call of ``torch.autograd.grad`` with the next known derivatives."""

    def __init__(self, derivatives: Iterator[Sequence[Tensor]]) -> None:
        super().__init__()
        self._derivatives = derivatives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.autograd.grad:
            return func(*args, **(kwargs or {}))
        inputs = as_sequence(grad_arguments(args, kwargs or {})["inputs"])
        given = next(self._derivatives, ())
        if [x.shape for x in inputs] != [d.shape for d in given]:
            raise CaptureError(
                f"the step differentiates with respect to tensors of shapes {[tuple(x.shape) for x in inputs]}; it was "
                f"captured with {[tuple(d.shape) for d in given]}. {_SAME_COORDINATES}"
            )
        return tuple(given)


@contextmanager
def step_with(
    module: nn.Module, replaced: ReplacedCalls, derivatives: Sequence[Tensor], outputs: Mapping[str, Any]
) -> Iterator[None]:
    """Lets submodules and ``torch.autograd.grad`` return what the stages computed, inside the block.

    Args:
        module: the LightningModule.
        replaced: the calls.
        derivatives: ∂E/∂x of all calls of ``torch.autograd.grad`` in the step itself, in their order.
        outputs: what each submodule returns, by the submodule's name.
    """
    remaining = iter(derivatives)
    with ExitStack() as stack:
        for name, output in outputs.items():
            stack.enter_context(
                patched(module.get_submodule(name), "forward", lambda *_, _output=output, **__: _output)
            )
        stack.enter_context(_GiveGrad(list(islice(remaining, num)) for num in replaced.num_inputs))
        yield


def potential_of(module: nn.Module, step: StepFunction, call: PotentialCall) -> nn.Module:
    """Returns the module whose forward is captured: a submodule, or the step up to its derivative."""
    if call.replaced is None:
        return module.get_submodule(call.path)
    return StepPotential(module, step, call.replaced)
