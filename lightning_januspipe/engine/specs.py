"""Defines how stages describe themselves to the engine: as pure functions, with symbolic shapes of their boundaries."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_januspipe.engine.autocast import OFF, Autocast

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq,
    "Ne": operator.ne,
    "And": lambda *terms: all(terms),
    "Or": lambda *terms: any(terms),
    "Not": operator.not_,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
}


@dataclass(frozen=True)
class TensorSpec:
    """Describes one tensor before it exists.

    All ranks of a pipeline hold the same batch, so each evaluates the shapes that it will receive by itself.

    Attributes:
        shape: A number, or an expression of the inputs' size symbols, for each dimension.
        dtype: Type of the entries.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape for given values of the symbols."""
        return tuple(s if isinstance(s, int) else int(evaluate(s, symbols)) for s in self.shape)


def violated_sizes(guard: str, symbols: Mapping[str, int]) -> dict[str, int]:
    """Returns the sizes that violate a guard, by their symbols; none if it holds.

    A guard that only a size of 0 or 1 violates is taken to hold: operations treat such sizes specially.

    Args:
        guard: A relation between size symbols.
        symbols: Their values.
    """
    names, function = _compiled(guard)
    sizes = {n: symbols[n] for n in names}
    if function(*sizes.values()) or function(*(max(size, 2) for size in sizes.values())):
        return {}
    return sizes


def evaluate(expression: str, symbols: Mapping[str, int]) -> Any:
    """Returns the value of an expression of size symbols: an int, or a number of sympy's."""
    if expression in symbols:
        return symbols[expression]
    names, function = _compiled(expression)
    return function(*(symbols[n] for n in names))


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> tuple[tuple[str, ...], Any]:
    """Returns the symbols of an expression of torch's symbolic shapes, and a function of their values.

    sympy needs milliseconds for each new value, and there are new ones in every batch; so it is for expressions only
    that mean something else in Python.
    """
    if _is_python(expression):
        return compiled_expression(expression)
    import sympy
    from torch.utils._sympy import functions

    known = {name: getattr(functions, name) for name in dir(functions) if name[0].isupper()}
    parsed = sympy.sympify(expression, locals=known)
    names = tuple(sorted(str(s) for s in parsed.free_symbols))

    def function(*values: int) -> Any:
        return parsed.subs(dict(zip(names, values, strict=True)))

    return names, function


def _is_python(expression: str) -> bool:
    """Returns whether an expression has the same value in Python as in sympy."""
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if isinstance(node, (ast.Div, ast.Invert)):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS):
            return False
    return True


@lru_cache(maxsize=4096)
def compiled_expression(text: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """Returns an expression or relation of sizes as a function, and the names of its arguments.

    The function also takes symbolic sizes.

    Args:
        text: as torch's symbolic shapes print it, which is Python but for the functions in it.
    """
    names = tuple(sorted(set(compile(text, "<sizes>", "eval").co_names) - set(_FUNCTIONS)))
    function = eval(f"lambda {', '.join(names)}: {text}", dict(_FUNCTIONS))
    return names, function


@dataclass(frozen=True)
class StageOutput:
    """Holds the results of one forward pass of a stage.

    Attributes:
        boundary: Values for the next stage.
        energies: The energies that are differentiated, in eV, one number each; usually only the last stage has any.
        observables: The values that this stage computes and the loss reads, such as energies of structures or charges.
        coordinates: The inputs of the differentiation, as this stage made them: positions (N, 3) in Å, strain.
    """

    boundary: list[Tensor]
    energies: list[Tensor]
    observables: list[Tensor]
    coordinates: list[Tensor]


class StageFunction(Protocol):
    """Computes one stage as a pure function ``(h_out, y) = f(h_in, x, batch; θ)``, captured or written by hand.

    Attributes:
        index: Index of the stage in the chain.
        parameters: The trainable parameters that this stage reads.
        boundary_in: Specs of the values received from the stage before.
        boundary_out: Specs of the values sent to the next stage.
        observables: Indices, among all observables, of the observables that this stage computes.
    """

    index: int
    parameters: Sequence[nn.Parameter]
    boundary_in: Sequence[TensorSpec]
    boundary_out: Sequence[TensorSpec]
    observables: Sequence[int]

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage on the potential call's tensors and the values received."""


@dataclass(frozen=True)
class Dependence:
    """Says what depends on a value of a boundary.

    Attributes:
        energy: Whether an energy depends on it.
        forces: Whether an energy's derivative may depend on it, which it does not if the energy is linear in it.
        observables: Indices of the observables that depend on it.
    """

    energy: bool
    forces: bool
    observables: frozenset[int]


@dataclass(frozen=True)
class ChainSpec:
    """Holds what all stages of a chain share.

    Attributes:
        coordinates: Specs of the inputs of the differentiation; ∂E/∂x has the same.
        observables: Specs of all observables, in order.
        observable_stage: The stage that computes each observable.
        autocast: The autocast that FF differentiates under.
        dependence: What depends on each value of each boundary; empty if that is not known, as with explicit stages,
            where parameters that affect only what the loss does not read then get gradients of zeros.
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
        """Returns the gradients that a stage received for FF, with None for values that no energy depends on.

        Args:
            stage: Index of the stage.
            gradients: ∂E/∂h_out, one for each value that the stage sent.
        """
        if not gradients or not self.dependence:
            return gradients
        return [g if r.energy else None for g, r in zip(gradients, self.dependence[stage], strict=True)]

    def read_cotangents(
        self, stage: int, cotangents: Sequence[Tensor], seeds: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Returns the cotangents that a stage received for BE, with None for values that do not affect the loss.

        A message holds zeros for such values. Parameters that affect only a charge, say, would get a gradient of zeros
        from them, and an optimizer would decay these parameters, which have no gradient in a single process.

        Args:
            stage: Index of the stage.
            cotangents: λ_out = ∂L/∂h_out, one for each value that the stage sent.
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
    """Holds the gradients of the loss of one micro-batch, with which BF and BE start.

    Attributes:
        observables: ∂L/∂y for every observable, None where the loss does not read it.
        derivatives: v = ∂L/∂(∂E/∂x).
    """

    observables: list[Tensor | None]
    derivatives: list[Tensor]


LossFunction = Callable[[int, list[Tensor], list[Tensor]], LossGradients]


@dataclass(frozen=True)
class MicrobatchInput:
    """Holds one micro-batch as the stages see it.

    Attributes:
        tensors: The potential call's tensors. On graph ranks, the exchanges between these ranks follow.
        symbols: Values of the size symbols.
    """

    tensors: list[Any]
    symbols: Mapping[str, int]
