"""PyTorch Geometric's ViSNet; edges within the cutoff are found without its compiled package."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, labels_of, seeded_model
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn.models import ViSNet, visnet


def radius_graph(pos: Tensor, r: float, batch: Tensor, loop: bool = False, **_: Any) -> Tensor:
    """Returns edges within a distance, as the function of the same name in torch-cluster."""
    near = (torch.cdist(pos.detach(), pos.detach()) < r) & (batch[:, None] == batch[None])
    if not loop:
        near = near & ~torch.eye(len(pos), dtype=torch.bool)
    return near.nonzero().T


torch.set_default_dtype(torch.float64)  # ViSNet makes lengths of it
visnet.radius_graph = radius_graph


def sample(atoms: Atoms) -> Data:
    """Returns a molecule with labels."""
    labels = labels_of(atoms)
    return Data(
        z=torch.tensor(atoms.numbers).long(),
        pos=torch.tensor(atoms.positions),
        energy=labels["energy"],
        forces=labels["forces"],
    )


def of_visnet(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies and forces."""
    return list(model(batch.z, batch.pos, batch.batch))


def make_visnet() -> Training:
    """A small ViSNet."""
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_channels": 8, "num_heads": 2, "num_rbf": 4, "max_z": 40}
    return Training(seeded_model(lambda: ViSNet(**sizes, cutoff=CUTOFF, derivative=True)), of_visnet, lambda b: b)


molecules = partial(Structures, "molecules", sample, loader=DataLoader)
