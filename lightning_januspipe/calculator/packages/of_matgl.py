"""Makes the batches of potentials of MatGL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class MatGLAtomsAdapter(AtomsAdapter):
    """Makes the graphs of MatGL, whose stress is in GPa."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.model.cutoff))
        self.symbols = list(model.model.element_types)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        from torch_geometric.data import Data

        cell = np.array(atoms.cell.complete()) if atoms.pbc.any() else np.eye(3)
        graph = Data(
            num_nodes=len(atoms),
            edge_index=torch.from_numpy(edges.edge_index[::-1].copy()),
            pbc_offset=torch.tensor(edges.cell_shifts, dtype=dtype),
            node_type=torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED)),
            frac_coords=torch.tensor(np.linalg.solve(cell.T, atoms.positions.T).T, dtype=dtype),
        )
        return graph, torch.tensor(cell, dtype=dtype)[None], torch.zeros(2, dtype=dtype)

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        graph, lattice, state = batch
        return potential(g=graph, lat=lattice, state_attr=state)

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        energy, forces, stress = output[:3]
        return {"energy": energy, "forces": forces, "stress": stress * units.GPa}
