"""SevenNet, whose forces and stress are sums over derivatives with respect to edge vectors."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import sevenn._keys as key
import torch
from ase import Atoms
from client_parts import CUTOFF, NUMBERS, Structures, Training, in_float64, labels_of, seeded_model
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
from sevenn.atom_graph_data import AtomGraphData
from sevenn.model_build import build_E3_equivariant_model
from sevenn.train.dataload import unlabeled_atoms_to_graph
from torch import Tensor, nn
from torch_geometric.loader import DataLoader

in_float64()


def sample(atoms: Atoms) -> Any:
    """Returns a graph with labels."""
    graph = unlabeled_atoms_to_graph(atoms, CUTOFF)
    labels = labels_of(atoms)
    species = {number: index for index, number in enumerate(NUMBERS)}
    data = AtomGraphData.from_numpy_dict(graph)
    data[key.NODE_FEATURE] = torch.tensor([species[int(z)] for z in atoms.numbers])
    for name, value in list(data.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            data[name] = value.double()
    data[key.EDGE_VEC].requires_grad_(False)
    data.energy, data.forces, data.stress = labels["energy"], labels["forces"], labels["stress"]
    del data[key.INFO]
    return data


def predict(model: nn.Module, batch: Any) -> list[Tensor]:
    """Energies, forces, and stress as a vector of six."""
    out = model(batch)
    return [out[key.PRED_TOTAL_ENERGY], out[key.PRED_FORCE], out[key.PRED_STRESS]]


class SixStress(Training):
    """Compares the six numbers of a stress."""

    def __init__(self, model: nn.Module) -> None:
        order = torch.tensor([0, 4, 8, 1, 5, 6])

        def labels(batch: Any) -> dict[str, Tensor]:
            stress = batch.stress.reshape(-1, 9)[:, order]
            return {"energy": batch.energy, "forces": batch.forces, "stress": stress}

        super().__init__(model, predict, labels)


def make_module() -> Training:
    """A small SevenNet."""
    config = copy.deepcopy(DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)
    config |= {
        key.CUTOFF: CUTOFF,
        key.NODE_FEATURE_MULTIPLICITY: 4,
        key.NUM_CONVOLUTION: 2,
        key.NUM_SPECIES: len(NUMBERS),
        key.TYPE_MAP: {number: index for index, number in enumerate(NUMBERS)},
        key.CHEMICAL_SPECIES: ["Al", "Ni", "Cu"],
        key.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: [8],
        key.CONV_DENOMINATOR: 10.0,
        key.SHIFT: 0.1,
        key.SCALE: 1.1,
        key.RADIAL_BASIS: {key.RADIAL_BASIS_NAME: "bessel", key.BESSEL_BASIS_NUM: 4},
        key.CUTOFF_FUNCTION: {key.CUTOFF_FUNCTION_NAME: "poly_cut", key.POLY_CUT_P: 6},
    }

    def make() -> nn.Module:
        model = build_E3_equivariant_model(config)
        model.set_is_batch_data(True)
        return model

    return SixStress(seeded_model(make))


crystals = partial(Structures, "crystals", sample, loader=DataLoader)
molecules = partial(Structures, "molecules", sample, boxed=True, loader=DataLoader)
