"""Modules and data that the strategy has to refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning
import tiny
import torch
from torch import Tensor, nn


class Energy(nn.Module):
    """A pair energy that a subclass spoils."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1))

    def features(self, vectors: Tensor) -> Tensor:
        distances = vectors.square().sum(-1, keepdim=True).sqrt()
        return torch.exp(-((distances - torch.linspace(1.0, 5.0, 8, dtype=vectors.dtype)) ** 2))

    def energy(self, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
        source, target = batch["edge_index"]
        shifts = torch.einsum("ei,eij->ej", batch["cell_shifts"], batch["cell"][batch["batch"][target]])
        per_edge = self.mlp(self.features(positions[source] - positions[target] + shifts)).squeeze(-1)
        per_atom = torch.zeros_like(positions[:, 0]).index_add(0, target, per_edge)
        return torch.zeros_like(batch["cell"][:, 0, 0]).index_add(0, batch["batch"], per_atom)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = batch["positions"].detach().requires_grad_()
        energy = self.energy(batch, positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"energy": energy, "forces": -gradient}


class Module(lightning.LightningModule):
    """Energy and force loss of any potential."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        self.potential = potential.double()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        out = self.potential(batch)
        return (out["energy"] - batch["energy"]).square().mean() + (out["forces"] - batch["forces"]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Direct(Energy):
    """Forces from a head, no derivative."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        energy = self.energy(batch, batch["positions"])
        return {"energy": energy, "forces": self.mlp[0].weight.sum() * batch["positions"]}


class Twice(Energy):
    """A derivative of a derivative."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = batch["positions"].detach().requires_grad_()
        energy = self.energy(batch, positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        (again,) = torch.autograd.grad(gradient.square().sum(), positions, create_graph=True)
        return {"energy": energy, "forces": -gradient - 0 * again}


class Detached(Energy):
    """Geometry without a gradient for the parameters: a loss of the forces trains nothing."""

    def energy(self, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = super().energy(batch, positions)
        return (
            frozen.detach()
            + 0.1 * torch.zeros_like(frozen).index_add(0, batch["batch"], positions.square().sum(-1))
            + self.mlp[-1].bias.sum()
        )


class Spring(Energy):
    """One parameter and two operations: there is nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Identity()
        self.stiffness = nn.Parameter(torch.ones(()))

    def energy(self, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
        stretched = torch.zeros_like(batch["cell"][:, 0, 0]).index_add(0, batch["batch"], positions.square().sum(-1))
        return stretched * self.stiffness


class OfLocalClass(Energy):
    """Returns an object of a class that no other process can find."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        class Outputs(dict[str, Tensor]): ...

        return Outputs(super().forward(batch))


class FirstOrder(Energy):
    """Forces without a graph."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = batch["positions"].detach().requires_grad_()
        energy = self.energy(batch, positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, retain_graph=True)
        return {"energy": energy, "forces": -gradient}


class NotFinite(Module):
    """A loss that is NaN in the second batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 else loss


class Manual(Module):
    """Manual optimization."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__(potential)
        self.automatic_optimization = False


class OwnBackward(Module):
    """An overridden backward."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class TwoOptimizers(Module):
    """Two optimizers."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.parameters()), torch.optim.SGD(self.parameters(), lr=0.1)]


class WholeVector(Module):
    """An optimizer that needs inner products over all parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def different_batches() -> tuple[Any, Any]:
    """Returns a loader that every rank shuffles with a seed of its own."""
    data = tiny.data()
    loader = data.train_dataloader()
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    sampler = order.tolist()
    return tiny.module(), torch.utils.data.DataLoader(
        loader.dataset, batch_size=8, sampler=sampler, collate_fn=loader.collate_fn
    )


def empty_dataset() -> tuple[Any, Any]:
    """Returns a loader without samples."""
    loader = tiny.data().train_dataloader()
    return tiny.module(), torch.utils.data.DataLoader([], batch_size=4, collate_fn=loader.collate_fn)


def _with(module: type[Module], potential: type[Energy] = Energy) -> Callable[[], tuple[Any, Any]]:
    return lambda: (module(potential()), tiny.data())


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "good": _with(Module),
    "direct forces": _with(Module, Direct),
    "one spring": _with(Module, Spring),
    "derivative of a derivative": _with(Module, Twice),
    "no second derivative": _with(Module, Detached),
    "no graph of the derivative": _with(Module, FirstOrder),
    "objects of a local class": _with(Module, OfLocalClass),
    "loss not finite": _with(NotFinite),
    "manual optimization": _with(Manual),
    "own backward": _with(OwnBackward),
    "two optimizers": _with(TwoOptimizers),
    "optimizer over all parameters at once": _with(WholeVector),
    "different batches": different_batches,
    "empty dataset": empty_dataset,
    "on the meta device": lambda: (tiny.module().to("meta"), tiny.data()),
    "tiny": lambda: (tiny.module(), tiny.data()),
}
