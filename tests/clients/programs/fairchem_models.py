"""fairchem-core's eSEN and UMA, with conservative heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, edges_of, labels_of, seeded_model
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModelV2
from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone
from fairchem.core.models.uma.escn_moe import eSCNMDMoeBackbone
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "sphere_channels": 8,
    "lmax": 2,
    "mmax": 2,
    "cutoff": CUTOFF,
    "edge_channels": 8,
    "hidden_channels": 8,
    "num_distance_basis": 8,
    "num_layers": 2,
    "direct_forces": False,
    "regress_forces": True,
    "regress_stress": True,
    "use_dataset_embedding": False,
}


def unlabelled(atoms: Atoms, edges: bool = True) -> AtomicData:
    """Returns a structure with charge 0 and spin 0, and its edges."""
    data = AtomicData.from_ase(atoms, r_edges=False, target_dtype=torch.float64, r_forces=False, r_stress=False)
    data.charge, data.spin, data.dataset = torch.zeros(1).long(), torch.zeros(1).long(), ["omat"]
    if edges:
        inside = atoms.copy()
        inside.positions = data.pos.numpy()
        (source, target), offsets = edges_of(inside, CUTOFF)
        order = torch.argsort(source, stable=True)  # fairchem's first row is the neighbour, the second the atom
        data.edge_index = torch.stack([target, source])[:, order]
        data.cell_offsets = offsets[order]
        data.nedges = torch.tensor([len(source)])
    return data


def sample(atoms: Atoms) -> AtomicData:
    """Returns a structure with charge 0 and spin 0, its edges and its labels."""
    data = unlabelled(atoms)
    for name, value in labels_of(atoms).items():
        setattr(data, name, value)
    return data


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies, forces and stress."""
    out = model(batch)["efs"]
    return [out["energy"], out["forces"], out["stress"]]


def training(backbone: Any, **settings: Any) -> Training:
    """Returns a LightningModule around a backbone with an energy-force-stress head."""

    def make() -> nn.Module:
        made = backbone(**SMALL | settings)
        return HydraModelV2(made, {"efs": MLP_EFS_Head(made, wrap_property=False)})

    return Training(seeded_model(make), predict, lambda b: b)


def make_esen() -> Training:
    """eSEN, which draws the roll angles of edges."""
    return training(eSCNMDBackbone, use_quaternion_wigner=False)


def make_esen_own_edges() -> Training:
    """ESEN that makes its edges in the forward."""
    return training(eSCNMDBackbone, use_quaternion_wigner=False, otf_graph=True)


def make_uma(moe_dropout: float = 0.0) -> Training:
    """UMA: eSEN with mixtures of linear experts."""
    return training(
        eSCNMDMoeBackbone,
        num_experts=4,
        use_composition_embedding=True,
        moe_dropout=moe_dropout,
        use_quaternion_wigner=True,
    )


make_uma_with_dropout = partial(make_uma, 0.1)


crystals = partial(Structures, "crystals", sample, atomicdata_list_to_batch)
molecules = partial(Structures, "molecules", sample, atomicdata_list_to_batch, boxed=True)
