"""What the engine needs to know of a stage: a pure function, and the symbolic shapes of what crosses its borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_januspipe.engine.autocast import OFF, Autocast


@dataclass(frozen=True)
class TensorSpec:
    """Shape (numbers, or expressions of the inputs' size symbols) and dtype of one tensor.

    All ranks of a pipeline hold the same batch, so each evaluates the shape of what it will receive by itself.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given values of the symbols."""
        return tuple(s if isinstance(s, int) else _evaluate(s, symbols) for s in self.shape)


def violated_sizes(condition: str, symbols: Mapping[str, int]) -> dict[str, int]:
    """The sizes for which a condition does not hold; none where it does.

    A condition that only a size of 0 or 1 breaks is taken to hold: operations treat such sizes specially.

    Args:
        condition: a relation between size symbols.
        symbols: their values.
    """
    names, function = _compiled(condition)
    sizes = {n: symbols[n] for n in names}
    if function(*sizes.values()) or function(*(max(size, 2) for size in sizes.values())):
        return {}
    return sizes


def _evaluate(expression: str, symbols: Mapping[str, int]) -> int:
    if expression in symbols:
        return symbols[expression]
    names, function = _compiled(expression)
    return int(function(*(symbols[n] for n in names)))


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> tuple[tuple[str, ...], Any]:
    """An expression of torch's symbolic shapes as a function; sympy is slow, so each is compiled once."""
    import sympy
    from torch.utils import _sympy

    known = {name: getattr(_sympy.functions, name) for name in dir(_sympy.functions) if name[0].isupper()}
    parsed = sympy.sympify(expression, locals=known)
    names = tuple(sorted(str(s) for s in parsed.free_symbols))

    def function(*values: int) -> Any:
        return parsed.subs(dict(zip(names, values, strict=True)))

    return names, function


@dataclass(frozen=True)
class StageOutput:
    """What one forward pass of a stage gives.

    Attributes:
        boundary: values for the next stage.
        energies: differentiated energies computed in this stage (usually in the last only), one number each.
        observables: values that the loss reads (per-structure energies, charges), those computed in this stage.
        coordinates: differentiation inputs (positions, strain), as this stage made them.
    """

    boundary: list[Tensor]
    energies: list[Tensor]
    observables: list[Tensor]
    coordinates: list[Tensor]


class StageFunction(Protocol):
    """A stage as a pure function ``(h_out, y) = f(h_in, x, batch; θ)``, captured or written by hand.

    Attributes:
        index: position in the chain.
        parameters: the trainable parameters that this stage reads.
        boundary_in: specs of the values received from the stage before.
        boundary_out: specs of the values sent to the next stage.
        observables: positions (among all observables) of those computed here.
    """

    index: int
    parameters: Sequence[nn.Parameter]
    boundary_in: Sequence[TensorSpec]
    boundary_out: Sequence[TensorSpec]
    observables: Sequence[int]

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluate the stage on the batch's tensors and the values received."""


@dataclass(frozen=True)
class Dependence:
    """Where a value of a boundary leads.

    Attributes:
        energy: an energy depends on it.
        forces: an energy's derivative may depend on it; not so if the energy is linear in it.
        observables: those that depend on it.
    """

    energy: bool
    forces: bool
    observables: frozenset[int]


@dataclass(frozen=True)
class ChainSpec:
    """What all stages of a chain share.

    Attributes:
        coordinates: specs of the differentiation inputs; the derivative has the same.
        observables: specs of all observables, in order.
        observable_stage: the stage that computes each observable.
        autocast: what FF differentiates under.
        dependence: for each boundary what depends on each of its values; empty where that is not known, as with stages
            of the potential's own: parameters that lead to what the loss does not read then get gradients of zeros.
    """

    coordinates: tuple[TensorSpec, ...]
    observables: tuple[TensorSpec, ...]
    observable_stage: tuple[int, ...]
    autocast: Autocast = OFF
    dependence: tuple[tuple[Dependence, ...], ...] = ()

    def observables_before(self, stage: int) -> list[int]:
        """Returns the indices of the observables that stages before this one compute."""
        return [i for i, s in enumerate(self.observable_stage) if s < stage]

    def force_seeds(self, stage: int, gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """What a stage received for FF, None for values that lead to no energy.

        Args:
            stage: position of the stage that received them.
            gradients: ∂E/∂h_out, one for each value that it sent.
        """
        if not gradients or not self.dependence:
            return gradients
        return [g if r.energy else None for g, r in zip(gradients, self.dependence[stage], strict=True)]

    def read_cotangents(
        self, stage: int, cotangents: Sequence[Tensor], seeds: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """What a stage received for BE, None for values that the loss depends on in no way.

        A message holds zeros for them. With these, parameters that only a charge depends on, say, would have a gradient
        of zeros where a single process has none, and an optimizer would decay them.

        Args:
            stage: position of the stage that received them.
            cotangents: λ_out = ∂L/∂h_out, one for each value that it sent.
            seeds: ∂L/∂y for every observable, None where the loss does not read it.
        """
        if not cotangents or not self.dependence:
            return cotangents
        return [
            c if r.forces or any(seeds[i] is not None for i in r.observables) else None
            for c, r in zip(cotangents, self.dependence[stage], strict=True)
        ]


@dataclass(frozen=True)
class LossGradients:
    """What the four phases need of the loss of one micro-batch.

    Attributes:
        observables: ∂L/∂y for every observable, None where the loss does not read it.
        derivatives: v = ∂L/∂(∂E/∂x).
    """

    observables: list[Tensor | None]
    derivatives: list[Tensor]


LossFunction = Callable[[int, list[Tensor], list[Tensor]], LossGradients]


@dataclass(frozen=True)
class MicrobatchInput:
    """One micro-batch as the stages see it: the potential call's tensors, and the values of its size symbols.

    On graph ranks the tensors end with what exchanges between them need, which is no tensor.
    """

    tensors: list[Any]
    symbols: Mapping[str, int]
