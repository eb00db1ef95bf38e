"""Orb's conservative potential, with its own loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, in_float64, labels_of, seeded_model
from orb_models.forcefield import atomic_system
from orb_models.forcefield.base import batch_graphs
from orb_models.forcefield.nn_util import ScalarNormalizer
from orb_models.forcefield.pretrained import orb_v3_conservative_architecture
from torch import Tensor

in_float64()
CONFIG = atomic_system.SystemConfig(radius=CUTOFF, max_num_neighbors=64)


def sample(atoms: Atoms, scale: float = 1.0) -> Any:
    """Returns a graph with labels, of which energy and forces are scaled."""
    labels = labels_of(atoms)
    stress = torch.tensor(atoms.get_stress())[None]
    graph = atomic_system.ase_atoms_to_atom_graphs(
        atoms, system_config=CONFIG, output_dtype=torch.float64, graph_construction_dtype=torch.float64
    )
    node, system = {"forces": scale * labels["forces"]}, {"energy": scale * labels["energy"], "stress": stress}
    return graph._replace(node_targets=node, system_targets=system)


class OwnLoss(Training):
    """Trains with the loss of the package."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model.loss(batch).loss  # type: ignore[operator, no-any-return]


def make_module(keeps_means: bool = False) -> Training:
    """A small Orb.

    Args:
        keeps_means: whether its loss updates running means, which depend on how often the loss is computed.
    """
    small = {"latent_dim": 8, "base_mlp_hidden_dim": 8, "head_mlp_hidden_dim": 8, "num_message_passing_steps": 2}
    model = seeded_model(lambda: orb_v3_conservative_architecture(**small, device="cpu", system_config=CONFIG))
    for part in model.modules():
        if isinstance(part, ScalarNormalizer) and not keeps_means:
            part.bn.momentum = 0.0
    return OwnLoss(model, lambda *_: [], lambda b: b)


def make_scaled() -> Training:
    """A small Orb whose forces are large enough to be compared with finite differences."""
    module = make_module()
    module.model.heads["energy"].normalizer.bn.running_var.fill_(1e6)  # type: ignore[index, union-attr]
    return module


make_with_running_means = partial(make_module, True)

# The loss is NaN where the errors of all forces of a micro-batch are too large for the confidence head.
crystals = partial(Structures, "crystals", sample, batch_graphs, batch_size=8)
molecules = partial(Structures, "molecules", partial(sample, scale=0.05), batch_graphs, boxed=True, batch_size=8)
