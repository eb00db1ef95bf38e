"""The backend of metatrain's PET, which takes tensors, in a module that differentiates its energy."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, NUMBERS, Structures, Training, edges_of, labels_of, seeded_model
from metatrain.pet.model import PET
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info
from torch import Tensor, nn

Sample = dict[str, Tensor]


def sample(atoms: Atoms) -> Sample:
    """Returns a structure with edges and labels."""
    (source, target), shifts = edges_of(atoms, CUTOFF)
    return {
        "positions": torch.tensor(atoms.positions),
        "species": torch.tensor(atoms.numbers).long(),
        "centers": source,
        "neighbors": target,
        "cells": torch.tensor(atoms.cell.array)[None],
        "cell_shifts": shifts.long(),
        "num_atoms": torch.tensor([len(atoms)]),
        **labels_of(atoms),
    }


def collate(samples: list[Sample]) -> Sample:
    """Returns the structures as one graph."""
    batch = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
    starts = torch.cumsum(batch["num_atoms"], 0) - batch["num_atoms"]
    for name in ("centers", "neighbors"):
        batch[name] = torch.cat([s[name] + start for s, start in zip(samples, starts, strict=True)])
    batch["system_indices"] = torch.repeat_interleave(torch.arange(len(samples)), batch["num_atoms"])
    return batch


class Potential(nn.Module):
    """Computes energies, forces and, of periodic structures, stresses.

    Args:
        pet: metatrain's model.
    """

    def __init__(self, pet: PET) -> None:
        super().__init__()
        self.backend = pet.backend
        self.width = pet.cutoff_width_adaptive

    def forward(self, batch: Sample, periodic: bool) -> tuple[Tensor, ...]:
        positions, cells, index = batch["positions"].requires_grad_(), batch["cells"], batch["system_indices"]
        strain = torch.zeros_like(cells, requires_grad=True)
        strained = positions + torch.bmm(positions[:, None], strain[index])[:, 0]
        cells = cells + torch.bmm(cells, strain)
        edges = [batch[name] for name in ("centers", "neighbors", "species")]
        data = self.backend.preprocess(strained, *edges, cells, batch["cell_shifts"], index, self.width)
        features = self.backend.calculate_features(data)
        of_atoms = self.backend.predict(*features, data, cells, index, ["energy"])[0]["energy"][0][:, 0]
        energy = torch.zeros(cells.shape[0], dtype=of_atoms.dtype).index_add(0, index, of_atoms)
        forces, virial = torch.autograd.grad(energy.sum(), [positions, strain], create_graph=self.training)
        if not periodic:
            return energy, -forces
        return energy, -forces, virial / torch.linalg.det(batch["cells"]).abs()[:, None, None]


def predict(model: nn.Module, batch: Sample, periodic: bool) -> tuple[Tensor, ...]:
    """Energies, forces and stresses."""
    return model(batch, periodic)


def make_model(unit: str = "eV", zbl: bool = False) -> PET:
    """Returns a small PET.

    Args:
        unit: of the energy.
        zbl: whether atoms that are close repel each other.
    """

    def made() -> nn.Module:
        sizes: dict[str, Any] = {"d_pet": 8, "d_head": 8, "d_node": 8, "d_feedforward": 8, "num_heads": 2}
        more = {"cutoff": CUTOFF, "num_attention_layers": 1, "zbl": zbl}
        hypers = get_default_hypers("pet")["model"] | sizes | more
        energy = get_energy_target_info("energy", {"quantity": "energy", "unit": unit})
        return PET(hypers, DatasetInfo("angstrom", sorted(NUMBERS), {"energy": energy}))

    return seeded_model(made)


def make(periodic: bool) -> Training:
    """Trains a small PET."""
    return Training(seeded_model(lambda: Potential(make_model())), partial(predict, periodic=periodic), lambda b: b)


make_of_crystals = partial(make, True)
make_of_molecules = partial(make, False)

crystals = partial(Structures, "crystals", sample, collate)
molecules = partial(Structures, "molecules", sample, collate)
