"""Defines the module that metatomic's engines call; TorchScript and metatomic read its annotations as they are."""

# ruff: noqa: UP006, UP035, UP045

from pathlib import Path
from typing import Dict, List, Optional

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
)
from torch import nn


class MetatomicModel(nn.Module):
    """Computes the energies of systems.

    Args:
        energies: Traced function from positions, species, edge index, cell shifts, cell and batch to the energies (N,)
            of the atoms in eV.
        numbers: Atomic numbers by species index.
        cutoff: Cutoff in Å.
    """

    table: torch.Tensor

    def __init__(self, energies: nn.Module, numbers: List[int], cutoff: float) -> None:
        super().__init__()
        self.energies = energies
        self.options = NeighborListOptions(cutoff=cutoff, full_list=True, strict=True)
        table = torch.full((max(numbers) + 1,), -1, dtype=torch.int64)
        table[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("table", table)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        """Returns the neighbour list that engines have to make."""
        return [self.options]

    def forward(
        self,
        systems: List[System],
        outputs: Dict[str, ModelOutput],
        selected_atoms: Optional[Labels],
    ) -> Dict[str, TensorMap]:
        """Returns the energy of each system in eV, where it is asked for."""
        if "energy" not in outputs:
            return {}
        if selected_atoms is not None:
            raise ValueError("energies of selected atoms are not there; expected selected_atoms=None")
        sums: List[torch.Tensor] = []
        for system in systems:
            found = system.get_neighbor_list(self.options).samples.values.to(torch.int64)
            edge_index = torch.stack([found[:, 1], found[:, 0]])
            species = self.table[system.types.to(torch.int64)]
            shifts = found[:, 2:5].to(system.positions.dtype)
            cell = system.cell.unsqueeze(0)
            energies = self.energies(system.positions, species, edge_index, shifts, cell, torch.zeros_like(species))
            sums.append(energies.sum().to(system.positions.dtype))
        values = torch.stack(sums).unsqueeze(1)
        device = values.device
        nothing: List[Labels] = []
        block = TensorBlock(
            values,
            Labels("system", torch.arange(len(systems), device=device).reshape(-1, 1)),
            nothing,
            Labels("energy", torch.zeros((1, 1), dtype=torch.int64, device=device)),
        )
        key = Labels("_", torch.zeros((1, 1), dtype=torch.int64, device=device))
        return {"energy": TensorMap(key, [block])}


def saved(
    energies: nn.Module,
    numbers: List[int],
    cutoff: float,
    reach: float,
    floats: torch.dtype,
    path: Path,
) -> None:
    """Writes the model to a file.

    Args:
        energies: See :class:`MetatomicModel`.
        numbers: See :class:`MetatomicModel`.
        cutoff: See :class:`MetatomicModel`.
        reach: Distance in Å beyond which atoms have no influence on each other's energies.
        floats: Type of positions and energies.
        path: The file.
    """
    capabilities = ModelCapabilities(
        outputs={"energy": ModelOutput(unit="eV")},
        atomic_types=numbers,
        interaction_range=reach,
        length_unit="Angstrom",
        supported_devices=["cpu", "cuda"],
        dtype=str(floats).removeprefix("torch."),
    )
    AtomisticModel(MetatomicModel(energies, numbers, cutoff).eval(), ModelMetadata(), capabilities).save(str(path))
