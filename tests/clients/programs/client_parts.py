"""What all factories share: small labelled structures in a DataModule, and a LightningModule around a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from ase import Atoms
from structures import CUTOFF, labelled
from torch import Tensor, nn
from torch.utils.data import DataLoader

NUMBERS = (13, 28, 29)
"""Atomic numbers of the elements."""

BOX = 14.0
"""Å, of the periodic box of a molecule, where a package takes periodic structures only."""


class Structures(lightning.LightningDataModule):
    """Structures of unequal size in batches.

    Args:
        kind: "crystals" or "molecules".
        sample: from a structure to a sample.
        collate: from samples to a batch.
        boxed: whether molecules are put into a periodic box.
        loader: makes the loader of samples, where it is not torch's.
        batch_size: structures in a batch.
    """

    def __init__(
        self,
        kind: str,
        sample: Callable[[Atoms], Any],
        collate: Callable[[list[Any]], Any] | None = None,
        boxed: bool = False,
        loader: Callable[..., Any] = DataLoader,
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        self._kind, self._sample, self._collate, self._boxed, self._loader = kind, sample, collate, boxed, loader
        self._batch_size = batch_size

    def train_dataloader(self) -> Any:
        samples = [self._sample(atoms) for atoms in structures(self._kind, self._boxed)]
        more = {} if self._collate is None else {"collate_fn": self._collate}
        return self._loader(samples, batch_size=self._batch_size, **more)


def structures(kind: str, boxed: bool = False) -> list[Atoms]:
    """Returns 16 labelled structures; molecules in a box get a stress of zero."""
    found = labelled(kind, 16)
    for atoms in found:
        if boxed and not atoms.cell.volume:
            calculator = atoms.calc
            atoms.set_cell([BOX] * 3)
            atoms.pbc = True
            atoms.calc = calculator
            calculator.atoms = atoms.copy()
            calculator.results["stress"] = np.zeros(6)
    return found


def edges_of(atoms: Atoms, cutoff: float = CUTOFF) -> tuple[Tensor, Tensor]:
    """Returns sources and targets (2, E), and cell offsets (E, 3): r = positions[1] + offsets @ cell - positions[0]."""
    from ase.neighborlist import neighbor_list

    source, target, offsets = neighbor_list("ijS", atoms, cutoff)
    edges = torch.stack([torch.tensor(source), torch.tensor(target)])
    return edges, torch.tensor(offsets, dtype=torch.float64).reshape(-1, 3)


def labels_of(atoms: Atoms) -> dict[str, Tensor]:
    """Returns energy (1,) in eV, forces (N, 3) in eV/Å, stress (1, 3, 3) in eV/Å³."""
    labels = {"energy": torch.tensor([atoms.get_potential_energy()]), "forces": torch.tensor(atoms.get_forces())}
    stress = atoms.get_stress(voigt=False)[None] if atoms.cell.volume else torch.zeros(1, 3, 3).numpy()
    return {k: v.to(torch.float64) for k, v in {**labels, "stress": torch.tensor(stress)}.items()}


class Training(lightning.LightningModule):
    """Trains energies, forces, and stress where the potential returns it.

    Args:
        model: the package's model.
        predict: from the model and a batch to energy, forces and (or not) stress.
        labels: from a batch to the labels.
    """

    def __init__(
        self, model: nn.Module, predict: Callable[[nn.Module, Any], Sequence[Tensor]], labels: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.model = model
        self._predict, self._labels = predict, labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        energy, forces, *stress = self._predict(self.model, batch)
        labels = self._labels(batch)
        loss = (energy.reshape(-1) - labels["energy"].reshape(-1)).square().mean() / 100
        loss = loss + (forces - labels["forces"].reshape(forces.shape)).square().mean()
        for value in stress:
            loss = loss + 10 * (value - labels["stress"].reshape(value.shape)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def seeded_model(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a model in float64 with seeded parameters."""
    torch.manual_seed(7)
    return make().double()


def in_float64() -> None:
    """Lets packages that convert to single precision by ``tensor.float()`` run in double precision."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
