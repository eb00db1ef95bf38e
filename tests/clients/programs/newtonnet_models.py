"""NewtonNet in an ordinary LightningModule; it differentiates by the vectors of edges, which are given."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, edges_of, labels_of, seeded_model
from newtonnet.layers.representations import get_representation_by_string
from newtonnet.models import NewtonNet
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader


def sample(atoms: Atoms) -> Data:
    """Returns a structure with edges and labels."""
    edges, offsets = edges_of(atoms)
    positions, labels = torch.tensor(atoms.positions), labels_of(atoms)
    return Data(
        z=torch.tensor(atoms.numbers).long(),
        edge_index=edges,
        disp=positions[edges[0]] - positions[edges[1]] - offsets @ torch.tensor(atoms.cell.array),
        energy=labels["energy"],
        forces=labels["forces"],
        num_nodes=len(atoms),
    )


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies and forces."""
    out = model(batch.z, batch.disp, batch.edge_index, batch.batch)
    return [out.energy, out.gradient_force]


def make_module() -> Training:
    """A small NewtonNet."""

    def make() -> nn.Module:
        shape = get_representation_by_string(CUTOFF, n_basis=4)
        sizes = {"n_features": 8, "n_interactions": 2}
        model = NewtonNet(**sizes, infer_properties=["energy", "gradient_force"], representations=shape)
        model.train()  # it keeps graphs of forces only after this call
        return model

    return Training(seeded_model(make), predict, lambda batch: batch)


crystals = partial(Structures, "crystals", sample, loader=DataLoader)
molecules = partial(Structures, "molecules", sample, loader=DataLoader)
