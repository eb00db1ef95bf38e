"""What authors of models get wrong, for the tests of the conformance class."""

from __future__ import annotations

from functools import partial
from typing import Any

import mutants
import plain_modules
import torch
from capture_models import make_batch
from torch import Tensor
from torch.utils.data import DataLoader

wrong_message = partial(mutants.mutated, "BE message off by a millionth", "on_train_epoch_start", plain_modules.InStep)


class ScaledGradient(plain_modules.InStep):
    """Scales one gradient a little, unless a plain Trainer trains it."""

    def on_after_backward(self) -> None:
        gradient = self.model.embedding.weight.grad
        if "JanusPipe" in type(self.trainer.strategy).__name__ and gradient is not None:
            gradient.mul_(1 + 1e-6)


class Unseeded(plain_modules.InStep):
    """Has other parameters at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.normal_(self.shift, generator=torch.Generator().manual_seed(torch.Generator().seed() % 2**31))


class _BranchingEnergies(plain_modules.Energies):
    """Takes another branch where positions are large."""

    def forward(self, batch: Any, positions: Tensor) -> Any:
        return super().forward(batch, positions if float(positions.detach().max()) < 1e3 else positions / 2)


class Branching(plain_modules.InStep):
    """Has a branch on values, which no trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _BranchingEnergies(4)


class EquallyLarge(plain_modules.Data):
    """Has structures of three atoms each."""

    def train_dataloader(self) -> Any:
        samples: Any = [make_batch((3,), seed) for seed in range(8)]
        return DataLoader(samples, batch_size=4, collate_fn=plain_modules.collate)
