"""Describes the call of the potential, and finds its arguments in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.trees import copied
from lightning_januspipe.errors import CaptureError

StepFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class ReplacedCalls:
    """Tells which calls in a step return what the stages compute.

    Attributes:
        submodules: names of the submodules that return energies, or differentiate energies in their own forward.
        num_inputs: for each ``torch.autograd.grad`` of the step itself, the number of tensors it differentiates by.
    """

    submodules: tuple[str, ...]
    num_inputs: tuple[int, ...]


@dataclass
class PotentialCall:
    """Holds one call of the potential, as the user's step made it.

    Attributes:
        path: dotted name of the potential inside the LightningModule; empty for the LightningModule itself.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        read_outputs: which of the tensors in the returned tree the step reads after the call.
        replaced: for a step that differentiates energies itself, which calls in it are replaced; the call's one
            argument is then the batch (see :class:`~lightning_januspipe.capture.find.in_step.StepPotential`). None for
            other steps.
        step_parameters: names of parameters inside the potential that such a step reads itself.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read_outputs: tuple[int, ...] = ()
    replaced: ReplacedCalls | None = None
    step_parameters: tuple[str, ...] = ()


class ReachedPotential(Exception):
    """Unwinds the user's step at the call of the potential, carrying the call's arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_call = args
        self.kwargs_of_call = kwargs


def as_sequence(value: Any) -> list[Tensor]:
    """Returns a tensor or a sequence of tensors, as ``torch.autograd.grad`` takes them, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def grad_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of ``torch.autograd.grad`` by name."""
    names = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def call_arguments(
    module: nn.Module, path: str, step: StepFunction, batch: Any, in_step: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Runs the user's step up to its call of the potential, and returns the arguments of that call.

    Args:
        module: the LightningModule.
        path: dotted name of the potential.
        step: the user's step.
        batch: the batch; the step gets a shallow copy.
        in_step: whether the step itself stands for the potential, with the batch as its argument.

    Raises:
        CaptureError: the potential is not called.
    """
    if in_step:
        return (batch,), {}
    submodule = module.get_submodule(path)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise ReachedPotential(args, kwargs)

    handle = submodule.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        step(copied(batch))
    except ReachedPotential as reached:
        return reached.args_of_call, reached.kwargs_of_call
    finally:
        handle.remove()
    raise CaptureError(
        f"the step of {type(module).__name__} did not call its potential {path!r} for this batch. Every batch has to "
        "go through the potential; skip unwanted batches in the dataset or its sampler."
    )
