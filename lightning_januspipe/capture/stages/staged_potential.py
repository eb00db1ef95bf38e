"""Defines the interface of a potential in stages, whether its stages were captured or are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_januspipe.capture.cut.cut import Profile
from lightning_januspipe.capture.find.grad_call import PotentialCall, ReplacedCalls
from lightning_januspipe.capture.size_names import SizeWords
from lightning_januspipe.engine.specs import ChainSpec, StageFunction, TensorSpec

Inputs = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
"""From positional and keyword arguments of a call of the potential to the tensors that all stages get."""


class ReturnValue(Protocol):
    """Computes what the potential's forward does after differentiating.

    Attributes:
        parameters: trainable parameters that it reads.
    """

    parameters: Sequence[nn.Parameter]

    def __call__(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> Any:
        """Returns the potential's return value, from the call's tensors, leaves for the observables, and ∂E/∂x."""

    def tensors(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns the available tensors of the return value, in the order of :attr:`StagedPotential.outputs`."""

    def of_forward(self, returned: Any) -> Any:
        """Brings what the forward itself returned into the form of this return value, with tensors in this order."""

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """Returns the return value in the form in which the forward gives it to the user's step.

        Args:
            args: positional arguments of the user's call.
            kwargs: its keyword arguments.
            value: the return value.
        """


@dataclass(frozen=True)
class StageOperations:
    """Lists the operations that one stage runs.

    Attributes:
        own: operations of the body that the stage owns.
        repeated: operations of the body that an earlier stage owns, and that this one computes again.
        geometry: operations that depend on no parameter, which every stage computes for itself.
        repeated_values: names and specs of the repeated values that the stage's own operations read.
    """

    own: Sequence[str]
    repeated: Sequence[str]
    geometry: Sequence[str]
    repeated_values: Sequence[tuple[str, TensorSpec]]


class StagedPotential(Protocol):
    """Holds a potential in stages, captured or declared, as data that can be sent to the other ranks."""

    @property
    def path(self) -> str:
        """Returns the dotted name of the potential inside the LightningModule."""

    @property
    def replaced(self) -> ReplacedCalls | None:
        """Returns the field of the same name of :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`."""

    @property
    def step_parameters(self) -> tuple[str, ...]:
        """Returns the field of the same name of :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`."""

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain."""

    @property
    def num_operations(self) -> list[int]:
        """Returns the number of operations, or parts, of each stage."""

    @property
    def operation_word(self) -> str:
        """Returns what :attr:`num_operations` counts: ``"operations"`` or ``"parts"``."""

    @property
    def boundary_bytes(self) -> Sequence[int]:
        """Returns the bytes of each boundary on the batch that was measured."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Returns the floating-point types that it computes in."""

    @property
    def chain(self) -> ChainSpec:
        """Returns the specs of derivative and observables."""

    @property
    def coordinate_names(self) -> Sequence[str]:
        """Returns the names of the differentiation inputs, for messages."""

    @property
    def observable_names(self) -> Sequence[str]:
        """Returns the names of the observables, for messages."""

    @property
    def outputs(self) -> Sequence[int]:
        """Tells which of the tensors that the forward returns are available."""

    @property
    def derived(self) -> Sequence[int]:
        """Tells which of :attr:`outputs` depend on the derivative (forces, stress)."""

    def bind_sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the values of the size symbols for one call's tensors.

        Raises:
            CaptureError: the stages are not right for a size.
        """

    def parameter_stages(self) -> dict[str, set[int]]:
        """Returns for each parameter, by its name inside the potential, the stages that read it."""

    def why_shared(self, parameter: str) -> str:
        """Returns, in words, why several stages read a parameter."""

    def boundary(self, stage: int) -> list[tuple[str, TensorSpec]]:
        """Returns the names and specs of the tensors that a stage sends to the next one."""

    def size_words(self) -> SizeWords:
        """Returns the field's words (atom, edge, structure) for the sizes of its tensors."""

    def stage_operations(self, stage: int) -> StageOperations | None:
        """Returns the operations that a stage runs; None where a stage is made of parts."""

    def profile(self, potential: nn.Module, tensors: Sequence[Tensor]) -> Profile | None:
        """Measures every operation on one call's tensors; None where a stage is made of parts."""

    def unvalidated_kinds(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> frozenset[str]:
        """Returns, in words, properties of a call that the forward may branch on, and that no validated call had.

        Args:
            potential: the live potential.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            symbols: values of its size symbols.
        """

    def with_validated(self, *calls: tuple[nn.Module, PotentialCall]) -> Self:
        """Returns the same potential, which counts these calls, each with the live potential, as validated."""

    def with_evaluation(self, potential: nn.Module, call: PotentialCall) -> Self:
        """Returns the same potential, which also takes the constants that a call has in evaluation."""

    def inputs(self, potential: nn.Module) -> Inputs:
        """Returns the function from a call of the live potential to the tensors that all stages get."""

    def stage(self, index: int, potential: nn.Module) -> StageFunction:
        """Returns one stage, with the parameters of the live potential."""

    def return_value(self, potential: nn.Module) -> ReturnValue:
        """Returns the object that computes the return value of the live potential's forward."""
