"""PyTorch Geometric's ViSNet, DimeNet++ and SchNet, with edges and pairs of edges that are found in torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, labels_of, seeded_model
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn.models import DimeNetPlusPlus, SchNet, ViSNet, dimenet, visnet


def radius_graph(pos: Tensor, r: float, batch: Tensor, loop: bool = False, **_: Any) -> Tensor:
    """Returns edges within a distance, as the function of the same name in torch-cluster."""
    near = (torch.cdist(pos.detach(), pos.detach()) < r) & (batch[:, None] == batch[None])
    if not loop:
        near = near & ~torch.eye(pos.shape[0], dtype=torch.bool)
    return near.nonzero().T


def triplets(edges: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """Returns pairs of edges k -> j -> i with k other than i, as DimeNet's function of the same name."""
    source, target = edges
    follows = (target[None] == source[:, None]) & (source[None] != target[:, None])
    second, first = follows.nonzero().T
    return target, source, target[second], source[second], source[first], first, second


torch.set_default_dtype(torch.float64)  # ViSNet makes lengths of it
visnet.radius_graph = dimenet.radius_graph = radius_graph
dimenet.triplets = triplets


def sample(atoms: Atoms) -> Data:
    """Returns a molecule with labels."""
    labels = labels_of(atoms)
    return Data(
        z=torch.tensor(atoms.numbers).long(),
        pos=torch.tensor(atoms.positions),
        energy=labels["energy"],
        forces=labels["forces"],
    )


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies and forces."""
    return list(model(batch.z, batch.pos, batch.batch))


def make_visnet() -> Training:
    """A small ViSNet."""
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_channels": 8, "num_heads": 2, "num_rbf": 4, "max_z": 40}
    return Training(seeded_model(lambda: ViSNet(**sizes, cutoff=CUTOFF, derivative=True)), predict, lambda b: b)


class Conservative(nn.Module):
    """Adds forces to a model of energies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        pos = pos.requires_grad_()
        energy = self.model(z, pos, batch)
        return energy, -torch.autograd.grad(energy.sum(), pos, create_graph=self.training)[0]


def make_dimenet() -> Training:
    """A small DimeNet++."""
    sizes: dict[str, Any] = {"hidden_channels": 8, "out_channels": 1, "num_blocks": 2, "int_emb_size": 4}
    sizes |= {"basis_emb_size": 4, "out_emb_channels": 8, "num_spherical": 3, "num_radial": 3, "cutoff": CUTOFF}

    def made() -> nn.Module:
        return Conservative(DimeNetPlusPlus(**sizes, output_initializer="glorot_orthogonal"))

    return Training(seeded_model(made), predict, lambda b: b)


def lengths(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns edges and their lengths, as SchNet's own graph of interactions."""
    edges = radius_graph(pos, CUTOFF, batch)
    return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=1)


def make_schnet() -> Training:
    """A small SchNet."""
    sizes: dict[str, Any] = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2, "num_gaussians": 8}
    sizes |= {"cutoff": CUTOFF, "interaction_graph": lengths}
    return Training(seeded_model(lambda: Conservative(SchNet(**sizes))), predict, lambda b: b)


molecules = partial(Structures, "molecules", sample, loader=DataLoader)
