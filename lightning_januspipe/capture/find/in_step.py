"""Handles steps that differentiate the energy themselves: ``self.model(batch)``, then ``torch.autograd.grad``.

The part of the step before that call stands for the potential. When the step runs for its loss, its submodules return
the energies that the stages computed, and ``torch.autograd.grad`` returns the derivative that the stages computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.find.grad_call import PotentialCall, StepFunction, as_sequence, grad_arguments
from lightning_januspipe.capture.patches import patched
from lightning_januspipe.errors import CaptureError


class StepPotential(nn.Module):
    """Runs a step up to its ``torch.autograd.grad`` as its forward, with the parameters of the LightningModule.

    Args:
        module: the LightningModule.
        step: its step, from a batch to what it returns.
        replaced: names of the submodules that return the energy.
    """

    def __init__(self, module: nn.Module, step: StepFunction, replaced: Sequence[str]) -> None:
        super().__init__()
        self._run = step
        self._replaced = {name: module.get_submodule(name) for name in replaced}
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
        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, submodule in self._replaced.items():
                hook = submodule.register_forward_hook(_keeper(outputs, name))
                stack.callback(hook.remove)
            try:
                with _StopAtGrad():
                    self._run(batch)
            except _AtGrad as reached:
                call = reached.call
            else:
                raise CaptureError(
                    f"the step of {type(self._owner[0]).__name__} calls torch.autograd.grad for some batches only; it "
                    "has to call it for every batch"
                )
        found = torch.autograd.grad(**call)
        missing = [name for name in self._replaced if name not in outputs]
        if missing:
            raise CaptureError(f"the step did not call {missing[0]!r} for this batch; every batch has to go through it")
        return list(found), {name: outputs[name] for name in self._replaced}


def _keeper(outputs: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output

    return keep


class _AtGrad(Exception):
    """Unwinds the step at its call of ``torch.autograd.grad``."""

    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.call = call


class _StopAtGrad(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            raise _AtGrad(grad_arguments(args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _GiveGrad(TorchFunctionMode):
    """Answers ``torch.autograd.grad`` with known derivatives."""

    def __init__(self, derivatives: Sequence[Tensor]) -> None:
        super().__init__()
        self._derivatives = derivatives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.autograd.grad:
            return func(*args, **(kwargs or {}))
        inputs = as_sequence(grad_arguments(args, kwargs or {})["inputs"])
        if [x.shape for x in inputs] != [d.shape for d in self._derivatives]:
            raise CaptureError(
                f"the step differentiates with respect to tensors of shapes {[tuple(x.shape) for x in inputs]}; it was "
                f"captured with {[tuple(d.shape) for d in self._derivatives]}. Training and evaluation steps have to "
                "differentiate with respect to the same coordinates, in one order."
            )
        return tuple(self._derivatives)


@contextmanager
def step_with(module: nn.Module, derivatives: Sequence[Tensor], outputs: Mapping[str, Any]) -> Iterator[None]:
    """Lets submodules return what the stages computed, and ``torch.autograd.grad`` the derivative, inside the block.

    Args:
        module: the LightningModule.
        derivatives: ∂E/∂x.
        outputs: what each submodule returns, by the submodule's name.
    """
    with ExitStack() as stack:
        for name, output in outputs.items():
            stack.enter_context(
                patched(module.get_submodule(name), "forward", lambda *_, _output=output, **__: _output)
            )
        stack.enter_context(_GiveGrad(derivatives))
        yield


def _returning(output: Any, *_: Any, **__: Any) -> Any:
    return output


def potential_of(module: nn.Module, step: StepFunction, call: PotentialCall) -> nn.Module:
    """Returns the module whose forward is captured: a submodule, or the step up to its derivative."""
    if call.replaced is None:
        return module.get_submodule(call.path)
    return StepPotential(module, step, call.replaced)
