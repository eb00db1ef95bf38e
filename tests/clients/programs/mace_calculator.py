"""The adapter with which a MACE model runs as a calculator; docs/use-a-model.md shows it."""

from __future__ import annotations

from typing import Any

import torch

from lightning_januspipe.calculator import AtomsAdapter


class MACEAdapter(AtomsAdapter):
    def __init__(self, model: Any) -> None:
        super().__init__(float(model.r_max))
        self.numbers = model.atomic_numbers.tolist()

    def batch_from_atoms(self, atoms: Any, edges: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        species = torch.tensor([self.numbers.index(number) for number in atoms.numbers])
        cell = torch.tensor(atoms.cell.array, dtype=dtype)
        unit_shifts = torch.tensor(-edges.cell_shifts, dtype=dtype)  # MACE's vectors are r_i - r_j + shift
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "node_attrs": torch.nn.functional.one_hot(species, len(self.numbers)).to(dtype),
            "edge_index": torch.tensor(edges.edge_index),
            "unit_shifts": unit_shifts,
            "shifts": unit_shifts @ cell,
            "cell": cell,
            "batch": torch.zeros(len(atoms), dtype=torch.long),
            "ptr": torch.tensor([0, len(atoms)]),
            "head": torch.zeros(1, dtype=torch.long),
        }

    def call(self, potential: Any, batch: Any) -> Any:
        return potential(batch, compute_stress=True)

    def results(self, potential: Any, batch: Any, output: Any) -> dict[str, torch.Tensor]:
        return super().results(potential, batch, output) | {"energies": output["node_energy"]}
