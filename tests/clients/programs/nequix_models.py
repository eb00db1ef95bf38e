"""Nequix's model for torch in an ordinary LightningModule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import NUMBERS, Structures, Training, edges_of, labels_of, seeded_model
from nequix.torch_impl.model import NequixTorch
from structures import CUTOFF
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader


def sample(atoms: Atoms) -> Data:
    """Returns a periodic structure with edges and labels."""
    edges, offsets = edges_of(atoms)
    return Data(
        species=torch.tensor([NUMBERS.index(number) for number in atoms.numbers]),
        pos=torch.tensor(atoms.positions),
        edge_index=edges.flip(0),
        edge_attr=offsets,
        cell=torch.tensor(atoms.cell.array)[None],
        **labels_of(atoms),
    )


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies, forces and stress."""
    of_atoms, forces, stress = model(
        batch.species, batch.pos, batch.edge_attr, batch.edge_index, batch.cell, None, None, batch.batch
    )
    return [torch.zeros_like(batch.energy).index_add(0, batch.batch, of_atoms), forces, stress]


def make_module() -> Training:
    """A small Nequix."""
    sizes: dict[str, Any] = {"n_layers": 2, "hidden_irreps": "8x0e + 4x1o", "lmax": 1, "radial_mlp_size": 8}
    return Training(
        seeded_model(lambda: NequixTorch(len(NUMBERS), cutoff=CUTOFF, **sizes)), predict, lambda batch: batch
    )


def adapter(model: Any) -> Any:
    """Returns a calculator's adapter, which needs the elements."""
    from lightning_januspipe.calculator import NequixAtomsAdapter

    return NequixAtomsAdapter(model, NUMBERS)


crystals = partial(Structures, "crystals", sample, loader=DataLoader)
