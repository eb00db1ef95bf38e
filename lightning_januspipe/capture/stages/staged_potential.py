"""What a potential in stages is to the rest of the package, however it came by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_januspipe.engine.specs import ChainSpec, StageFunction

Inputs = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
"""From positional and keyword arguments of a call of the potential to the tensors that all stages get."""


class ReturnValue(Protocol):
    """What the potential's forward does after differentiating.

    Attributes:
        parameters: trainable parameters that it reads.
    """

    parameters: Sequence[nn.Parameter]

    def __call__(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> Any:
        """The potential's return value, from the call's tensors, leaves for the observables, and ∂E/∂x."""

    def tensors(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> list[Tensor]:
        """The tensors in it that are available, as :attr:`StagedPotential.outputs` numbers them."""

    def of_forward(self, returned: Any) -> Any:
        """What the forward itself returned, in the form of this return value: its tensors are numbered alike."""

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """The return value in the form in which the forward gives it to the user's step.

        Args:
            args: positional arguments of the user's call.
            kwargs: its keyword arguments.
            value: the return value.
        """


class StagedPotential(Protocol):
    """A potential in stages, as data that can be sent to the other ranks: captured, or with stages of its own."""

    @property
    def path(self) -> str:
        """Dotted name of the potential inside the LightningModule."""

    @property
    def replaced(self) -> tuple[str, ...] | None:
        """See :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`."""

    @property
    def step_parameters(self) -> tuple[str, ...]:
        """See :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`."""

    @property
    def num_stages(self) -> int:
        """Length of the chain."""

    @property
    def num_operations(self) -> list[int]:
        """How many operations (or parts, where the potential divides itself) each stage has."""

    @property
    def boundary_bytes(self) -> Sequence[int]:
        """Bytes of each boundary on the batch that was measured."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Floating-point types that it computes in."""

    @property
    def chain(self) -> ChainSpec:
        """Specs of derivative and observables."""

    @property
    def outputs(self) -> Sequence[int]:
        """Which of the tensors that the forward returns are available."""

    @property
    def derived(self) -> Sequence[int]:
        """Those of them that depend on the derivative (forces, stress)."""

    def bind_sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Values of the size symbols for one call's tensors; a CaptureError for sizes that it is not right for."""

    def unvalidated_kinds(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> frozenset[str]:
        """Returns, in words, what the forward may branch on in a call and no validated call had.

        Args:
            potential: the live potential.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            symbols: values of its size symbols.
        """

    def parameter_stages(self) -> dict[str, set[int]]:
        """Name of each parameter inside the potential -> the stages that read it."""

    def inputs(self, potential: nn.Module) -> Inputs:
        """From a call of the live potential to the tensors that all stages get."""

    def stage(self, index: int, potential: nn.Module) -> StageFunction:
        """One stage, with the parameters of the live potential."""

    def return_value(self, potential: nn.Module) -> ReturnValue:
        """What the forward of the live potential returns."""
