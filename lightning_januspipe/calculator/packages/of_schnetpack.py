"""Makes the batches of potentials of SchNetPack."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import cell_of
from lightning_januspipe.calculator.skin import Edges


class SchNetPackAtomsAdapter(AtomsAdapter):
    """Makes the batches of SchNetPack, whose outputs are ``energy``, ``forces`` and ``stress`` in eV and Å."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.representation.cutoff))

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        source, target = torch.from_numpy(edges.edge_index)
        cell = cell_of(atoms, dtype)
        return {
            "_idx": torch.tensor([0]),
            "_n_atoms": torch.tensor([len(atoms)]),
            "_atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
            "_positions": torch.tensor(atoms.positions, dtype=dtype),
            "_cell": cell[None],
            "_pbc": torch.tensor(atoms.pbc),
            "_idx_i": target,
            "_idx_j": source,
            "_idx_m": torch.zeros(len(atoms), dtype=torch.int64),
            "_offsets": torch.tensor(edges.cell_shifts, dtype=dtype) @ cell,
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential(dict(batch))
