"""TorchMD-Net's equivariant transformer, graph network and TensorNet in its own LightningModule, which makes edges."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, labels_of
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torchmdnet.module import LNNP

SETTINGS: dict[str, Any] = {
    "load_model": None,
    "remove_ref_energy": False,
    "precision": 64,
    "derivative": True,
    "embedding_dimension": 8,
    "num_layers": 2,
    "num_rbf": 4,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "cutoff_lower": 0.0,
    "cutoff_upper": CUTOFF,
    "max_z": 40,
    "max_num_neighbors": 64,
    "neighbor_embedding": True,
    "aggr": "add",
    "attn_activation": "silu",
    "num_heads": 2,
    "distance_influence": "both",
    "equivariance_invariance_group": "O(3)",
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "lr_factor": 0.8,
    "lr_patience": 10,
    "lr_min": 1e-7,
    "lr_warmup_steps": 0,
    "ema_alpha_y": 1.0,
    "ema_alpha_neg_dy": 1.0,
    "y_weight": 1.0,
    "neg_dy_weight": 1.0,
    "train_loss": "mse_loss",
}


class Module(LNNP):
    """TorchMD-Net's own, with an optimizer that monitors no validation."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def make(model: str) -> LNNP:
    """Returns a small model of one kind."""
    torch.manual_seed(7)
    return Module({**SETTINGS, "model": model})


make_et = partial(make, "equivariant-transformer")
make_gn = partial(make, "graph-network")
make_tensornet = partial(make, "tensornet")


def sample(atoms: Atoms) -> Data:
    """Returns a molecule with labels."""
    labels = labels_of(atoms)
    return Data(
        z=torch.tensor(atoms.numbers).long(),
        pos=torch.tensor(atoms.positions),
        y=labels["energy"][:, None],
        neg_dy=labels["forces"],
    )


molecules = partial(Structures, "molecules", sample, loader=DataLoader)
