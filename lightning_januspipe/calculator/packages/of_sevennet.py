"""Makes the batches of potentials of SevenNet."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class SevenNetAtomsAdapter(AtomsAdapter):
    """Makes the batches of SevenNet's models of one modality."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.cutoff))
        self.symbols = symbols_of(model.type_map)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species_index(atoms, self.symbols, "the structure", TRAINED)
        numbers = torch.tensor(atoms.numbers, dtype=torch.int64)
        return {
            "x": numbers,
            "atomic_numbers": numbers,
            "pos": torch.tensor(atoms.positions, dtype=dtype),
            "edge_index": torch.from_numpy(edges.edge_index[::-1].copy()),
            "edge_vec": torch.tensor(edges.vectors, dtype=dtype),
            "cell_volume": torch.tensor([atoms.cell.volume], dtype=dtype),
            "num_atoms": torch.tensor([len(atoms)]),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential({**batch, "edge_vec": batch["edge_vec"].clone(), "cell_volume": batch["cell_volume"].clone()})

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        xx, yy, zz, xy, yz, zx = -output["inferred_stress"].reshape(6)
        stress = torch.stack([xx, xy, zx, xy, yy, yz, zx, yz, zz]).reshape(3, 3)
        return {
            "energy": output["inferred_total_energy"],
            "forces": output["inferred_force"],
            "stress": stress,
            "energies": output["atomic_energy"],
        }
