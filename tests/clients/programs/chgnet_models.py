"""CHGNet's own package, which takes lists of graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from chgnet.graph import CrystalGraphConverter
from chgnet.graph import crystalgraph as graphs
from chgnet.model import CHGNet
from chgnet.model import model as chgnet_model
from client_parts import Structures, Training, labels_of, seeded_model
from pymatgen.io.ase import AseAtomsAdaptor
from torch import Tensor, nn

graphs.TORCH_DTYPE = chgnet_model.TORCH_DTYPE = torch.float64
converter = CrystalGraphConverter(atom_graph_cutoff=4.0, bond_graph_cutoff=3.0, verbose=False)


def sample(atoms: Atoms) -> dict[str, Any]:
    """Returns a graph with labels."""
    graph = converter(AseAtomsAdaptor.get_structure(atoms))
    for name, value in vars(graph).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(graph, name, value.double())
    return {"graph": graph, **labels_of(atoms)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a list of graphs, and joined labels."""
    labels = {k: torch.cat([s[k] for s in samples]) for k in ("energy", "forces", "stress")}
    return {"graphs": [s["graph"] for s in samples], **labels}


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies for each atom, forces, and stress in GPa."""
    out = model(batch["graphs"], task="efs")
    return [out["e"], torch.cat(list(out["f"])), torch.stack(list(out["s"])) / 160.21766208]


def make_module() -> Training:
    """A small CHGNet."""

    def make() -> nn.Module:
        return CHGNet(
            atom_fea_dim=8,
            bond_fea_dim=8,
            angle_fea_dim=8,
            composition_model=None,
            num_radial=5,
            num_angular=5,
            n_conv=2,
            atom_conv_hidden_dim=8,
            bond_conv_hidden_dim=8,
            mlp_hidden_dims=(8, 8),
            atom_graph_cutoff=4.0,
            bond_graph_cutoff=3.0,
        )

    return Training(seeded_model(make), predict, lambda b: b)


crystals = partial(Structures, "crystals", sample, collate)
