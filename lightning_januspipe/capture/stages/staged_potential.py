"""The interface of a potential in stages, whether its stages were captured or are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_januspipe.capture.cut.cut import Profile
from lightning_januspipe.capture.find.grad_call import PotentialCall
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
        """Returns what the forward itself returned in the form of this return value, with its tensors in this order."""

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """Returns the return value in the form in which the forward gives it to the user's step.

        Args:
            args: positional arguments of the user's call.
            kwargs: its keyword arguments.
            value: the return value.
        """


@dataclass(frozen=True)
class StageOperations:
    """The operations that one stage runs.

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
        """How many operations, or parts, each stage has."""

    @property
    def operation_word(self) -> str:
        """What :attr:`num_operations` counts: ``"operations"`` or ``"parts"``."""

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
    def coordinate_names(self) -> Sequence[str]:
        """Names of the differentiation inputs, for messages."""

    @property
    def observable_names(self) -> Sequence[str]:
        """Names of the observables, for messages."""

    @property
    def outputs(self) -> Sequence[int]:
        """Which of the tensors that the forward returns are available."""

    @property
    def derived(self) -> Sequence[int]:
        """Which of these depend on the derivative (forces, stress)."""

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
        """Returns, in words, what the forward may branch on in a call and no validated call had.

        Args:
            potential: the live potential.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            symbols: values of its size symbols.
        """

    def with_validated(self, *calls: tuple[nn.Module, PotentialCall]) -> Self:
        """Returns the same potential, to which these calls, each with the live potential, count as validated."""

    def with_evaluation(self, potential: nn.Module, call: PotentialCall) -> Self:
        """Returns the same potential, which also takes the constants that a call has in evaluation."""

    def inputs(self, potential: nn.Module) -> Inputs:
        """Returns the function from a call of the live potential to the tensors that all stages get."""

    def stage(self, index: int, potential: nn.Module) -> StageFunction:
        """Returns one stage, with the parameters of the live potential."""

    def return_value(self, potential: nn.Module) -> ReturnValue:
        """Returns what computes the return value of the live potential's forward."""
