"""Makes the batches of potentials of TorchMD-Net."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import charge_of, embedded_symbols
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class TorchMDNetAtomsAdapter(AtomsAdapter):
    """Makes the batches of TorchMD-Net, which finds the edges itself, of models trained in eV and Å."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.representation_model.cutoff_upper))
        self.symbols = embedded_symbols(model.representation_model)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the batch of one structure.

        Raises:
            ValueError: TorchMD-Net finds no edges in such a cell.
        """
        species_index(atoms, self.symbols, "the structure", TRAINED)
        batch = {
            "z": torch.tensor(atoms.numbers, dtype=torch.int64),
            "pos": torch.tensor(atoms.positions, dtype=dtype),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
            "q": torch.tensor([charge_of(atoms)], dtype=dtype),
        }
        if not atoms.pbc.any():
            return batch
        if not _is_reduced(atoms, self.cutoff):
            raise ValueError(
                f"TorchMD-Net finds no edges in the cell {atoms.cell.array.tolist()} Å, periodic={atoms.pbc.tolist()}; "
                "expected three periodic directions, a lower triangle, a diagonal of at least "
                f"{2 * self.cutoff} Å (twice the cutoff), and below it at most half of the diagonal"
            )
        return batch | {"box": torch.tensor(atoms.cell.array, dtype=dtype)}

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        positions = batch["pos"].detach().clone().requires_grad_(True)
        energy, forces = potential(**{**batch, "pos": positions})
        if not potential.derivative:
            energy = energy + 0 * positions.sum()  # a lone atom's does not depend on them
            forces = -torch.autograd.grad([energy.sum()], [positions])[0]
        return energy, forces

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        energy, forces = output
        return {"energy": energy, "forces": forces}


def _is_reduced(atoms: Atoms, cutoff: float) -> bool:
    """Returns whether a cell is one in which TorchMD-Net finds all edges."""
    cell = atoms.cell.array
    a, b, c = np.diagonal(cell)
    lower = bool((np.abs(np.triu(cell, 1)) < 1e-12).all())
    near = 2 * abs(cell[1, 0]) <= a and 2 * abs(cell[2, 0]) <= a and 2 * abs(cell[2, 1]) <= b
    return bool(atoms.pbc.all()) and lower and near and min(a, b, c) >= 2 * cutoff
