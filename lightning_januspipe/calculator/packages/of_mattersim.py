"""Makes the batches of potentials of MatterSim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED
from lightning_januspipe.calculator.packages.package_parts import (
    EnergyAtomsAdapter,
    cell_of,
    double_for_float,
    symbols_of,
)
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class MatterSimAtomsAdapter(EnergyAtomsAdapter):
    """Makes the batches of MatterSim's M3GNet, with the triplets of atoms that MatterSim finds."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.model_args["cutoff"]))
        self.threebody_cutoff = float(model.model_args["threebody_cutoff"])
        self.symbols = symbols_of(range(1, model.max_z + 1))

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        from mattersim.datasets.utils.convertor import compute_threebody_indices

        species_index(atoms, self.symbols, "the structure", TRAINED)
        order = np.argsort(edges.edge_index[1], kind="stable")  # edges of one atom follow one another
        bonds = edges.edge_index[::-1, order].copy()
        lengths = np.linalg.norm(edges.vectors[order], axis=1)
        triplets, num_triplets, *_ = compute_threebody_indices(
            bonds.T, lengths, len(atoms), atoms.numbers, self.threebody_cutoff
        )
        of_bonds = torch.from_numpy(num_triplets).long()
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "cell": cell_of(atoms, dtype),
            "pbc_offsets": torch.tensor(edges.cell_shifts[order], dtype=dtype),
            "atom_attr": torch.tensor(atoms.numbers, dtype=dtype)[:, None],
            "edge_index": torch.from_numpy(bonds),
            "three_body_indices": torch.from_numpy(triplets).long(),
            "num_three_body": torch.tensor([len(triplets)]),
            "num_bonds": torch.tensor([bonds.shape[1]]),
            "num_triple_ij": of_bonds[:, None],
            "num_atoms": torch.tensor([len(atoms)]),
            "num_graphs": torch.tensor(1),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
            "bond_index_bias": torch.zeros(len(triplets), 1, dtype=torch.int64),
            "three_body_edge_map": torch.repeat_interleave(torch.arange(len(of_bonds)), of_bonds),
        }

    @override
    def energies(self, potential: Any, batch: Mapping[str, Any], positions: Tensor, cell: Tensor) -> Tensor:
        with double_for_float(positions.dtype):
            return potential({**batch, "atom_pos": positions, "cell": cell[None]})
