"""A module that holds one of everything, for the tests of keys."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_januspipe.capture.cache.key import program_key
from lightning_januspipe.capture.find.grad_call import PotentialCall

SCALE = 2.0
OPTIONS = {"power": 2}


def helper(x: Tensor) -> Tensor:
    """Reads a global, and is called by a forward."""
    return x ** OPTIONS["power"]


class Kind(Enum):
    SUM = "sum"
    MEAN = "mean"


class Settings:
    """An ordinary object."""

    def __init__(self, cutoff: float) -> None:
        self.cutoff, self.owner = cutoff, self


class Inner(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * helper(self.linear(x)) * self.factor


class Another(Inner):
    """The same but for its name."""


class Scripted(nn.Module):
    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.cutoff


def scripted(value: Any) -> Any:
    """Returns a TorchScript module, which newer versions of torch warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(value)


def double(x: Tensor) -> Tensor:
    return x * 2.0


def triple(x: Tensor) -> Tensor:
    return x * 3.0


class Net(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.cutoff = 5.0
        self.inner = nn.ModuleDict({"a": Inner(), "b": Inner()})
        self.register_buffer("shift", torch.tensor([0.5, -1.0]))
        self.offset = torch.zeros(2)
        self.table = np.arange(3.0)
        self.species = {"H", "C", "O"}
        self.settings = Settings(1.5)
        self.nested = [{"radii": (0.3, 0.5)}]
        self.act: Callable[..., Any] = lambda x: x * 2
        self.weight = functools.partial(torch.mul, other=1.5)
        self.function: Callable[..., Any] = torch.tanh
        self.kind = Kind.SUM
        self.dtype = torch.float64
        self.script = scripted(Scripted(4.0))
        self.compiled = scripted(double)


def call(**changes: Any) -> PotentialCall:
    """Returns a call with one batch, whose entries may be changed or added to."""
    batch = {"positions": torch.zeros(4, 3), "species": torch.zeros(4, dtype=torch.long), "periodic": True, **changes}
    return PotentialCall("potential", (batch,), {})


def key(potential: nn.Module, *arguments: Any, **named: Any) -> str:
    """Returns the digest of the key; there has to be one."""
    found = program_key(potential, *(arguments or (call(),)), **named)
    assert found.digest is not None, found.reason
    return found.digest
