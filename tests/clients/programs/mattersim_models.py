"""MatterSim's M3GNet in its own ``Potential``."""

from __future__ import annotations

from functools import partial
from typing import Any

from ase import Atoms
from client_parts import CUTOFF, Structures, Training, in_float64, labels_of, seeded_model
from mattersim.datasets.utils.convertor import GraphConvertor
from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
from mattersim.forcefield.potential import Potential, batch_to_dict
from torch import Tensor, nn
from torch_geometric.loader import DataLoader

in_float64()
THREE_BODY_CUTOFF = 3.0
convertor = GraphConvertor("m3gnet", CUTOFF, True, THREE_BODY_CUTOFF)


def sample(atoms: Atoms) -> Any:
    """Returns a graph with triplets and labels."""
    graph = convertor.convert(atoms.copy())
    labels = labels_of(atoms)
    for name, value in graph.to_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            graph[name] = value.double()
    graph.energy, graph.label_forces, graph.label_stress = labels["energy"], labels["forces"], labels["stress"]
    return graph


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies, forces, and stress in GPa."""
    out = model(batch_to_dict(batch, device="cpu"), include_forces=True, include_stresses=True)
    return [out["total_energy"], out["forces"], out["stresses"] / 160.21766208]


def labels(batch: Any) -> dict[str, Tensor]:
    """Returns the labels."""
    return {"energy": batch.energy, "forces": batch.label_forces, "stress": batch.label_stress}


def make_module() -> Training:
    """A small M3GNet."""

    def make() -> nn.Module:
        sizes = {"num_blocks": 2, "units": 8, "max_l": 2, "max_n": 3}
        return M3Gnet(**sizes, cutoff=CUTOFF, threebody_cutoff=THREE_BODY_CUTOFF, max_z=40, device="cpu")

    return Training(Potential(seeded_model(make), device="cpu"), predict, labels)


crystals = partial(Structures, "crystals", sample, loader=DataLoader)
molecules = partial(Structures, "molecules", sample, boxed=True, loader=DataLoader)
