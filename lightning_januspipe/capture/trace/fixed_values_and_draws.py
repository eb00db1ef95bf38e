"""Describes what a captured program needs from each batch beside tensors: values to check, and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_januspipe.engine.specs import TensorSpec


@dataclass(frozen=True)
class FixedValue:
    """Records a value that the forward read from a tensor when it was traced; the program is right only for this value.

    Attributes:
        value: a truth value, a number, or a list of them.
        place: the line of the forward that read it.
    """

    value: Any
    place: str


@dataclass(frozen=True)
class Draw:
    """Describes the random numbers of one operation of the forward, and draws them.

    Attributes:
        kind: the distribution, one of :data:`_KINDS`.
        spec: shape and type of the numbers.
        arguments: arguments of the distribution, such as limits, a mean, or a probability.
    """

    kind: str
    spec: TensorSpec
    arguments: tuple[float, ...] = ()

    def __call__(self, symbols: Mapping[str, int], device: torch.device, training: bool) -> Tensor:
        """Draws from the global generator.

        Args:
            symbols: values of the size symbols.
            device: the device of the numbers.
            training: whether dropout is on.
        """
        shape, dtype = self.spec.sizes(symbols), self.spec.dtype
        if self.kind == "dropout" and not training:
            return torch.ones(shape, dtype=dtype, device=device)
        return _KINDS[self.kind](shape, dtype, device, *self.arguments)


Shape = tuple[int, ...]


def _filled(method: str) -> Callable[..., Tensor]:
    def draw(shape: Shape, dtype: torch.dtype, device: torch.device, *arguments: float) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        drawn: Tensor = getattr(empty, method)(*arguments)
        return drawn

    return draw


def _dropout(shape: Shape, dtype: torch.dtype, device: torch.device, p: float) -> Tensor:
    return functional.dropout(torch.ones(shape, dtype=dtype, device=device), p, True)


_KINDS: dict[str, Callable[..., Tensor]] = {
    "rand": lambda shape, dtype, device: torch.rand(shape, dtype=dtype, device=device),
    "randn": lambda shape, dtype, device: torch.randn(shape, dtype=dtype, device=device),
    "randint": lambda shape, dtype, device, low, high: torch.randint(low, high, shape, dtype=dtype, device=device),
    "randperm": lambda shape, dtype, device: torch.randperm(shape[0], dtype=dtype, device=device),
    "uniform": _filled("uniform_"),
    "normal": _filled("normal_"),
    "exponential": _filled("exponential_"),
    "bernoulli": _filled("bernoulli_"),
    "dropout": _dropout,
}
