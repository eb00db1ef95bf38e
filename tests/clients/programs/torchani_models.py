"""TorchANI in an ordinary LightningModule that differentiates its energies; molecules are padded to one size."""

from __future__ import annotations

from functools import partial

import lightning
import torch
from ase import Atoms
from client_parts import Structures, labels_of, seeded_model
from torch import Tensor
from torchani.arch import simple_ani

ELEMENTS = {13: 1, 28: 6, 29: 8}
"""The atomic numbers in the place of the metals'."""

SCALE = 0.5
"""Distances of metals become about those of molecules."""


def sample(atoms: Atoms) -> dict[str, Tensor]:
    """Returns a molecule with labels."""
    species = torch.tensor([ELEMENTS[int(number)] for number in atoms.numbers])
    return {"species": species, "coordinates": SCALE * torch.tensor(atoms.positions), **labels_of(atoms)}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a batch (B, N) of species, and (B, N, 3) of coordinates and forces; padding has species -1."""
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], True, -1.0 if name == "species" else 0.0)
        for name in ("species", "coordinates", "forces")
    }
    return {**padded, "energy": torch.cat([s["energy"] for s in samples])}


class Training(lightning.LightningModule):
    """Trains energies and forces per atom, as TorchANI's own examples do."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        coordinates = batch["coordinates"].requires_grad_()
        energies = self.model((batch["species"], coordinates)).energies
        forces = -torch.autograd.grad(energies.sum(), coordinates, create_graph=True)[0]
        sizes = (batch["species"] >= 0).sum(1)
        of_energies = ((energies - batch["energy"]).square() / sizes.sqrt()).mean() / 1e4
        return of_energies + ((forces - batch["forces"]).square().sum((1, 2)) / sizes).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def make_module() -> Training:
    """A small ANI with a repulsion."""
    sizes = {"radial_shifts": 3, "angular_shifts": 2, "sections": 2}
    return Training(seeded_model(lambda: simple_ani(("H", "C", "O"), lot="wb97x-631gd", **sizes)))


molecules = partial(Structures, "molecules", sample, collate)
lone = partial(Structures, "lone", sample, collate)
