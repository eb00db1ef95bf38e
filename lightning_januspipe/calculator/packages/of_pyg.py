"""Makes the batches of ViSNet, DimeNet, DimeNet++ and SchNet of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED
from lightning_januspipe.calculator.packages.package_parts import EnergyAtomsAdapter, cell_of, embedded_symbols
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class PyGAtomsAdapter(EnergyAtomsAdapter):
    """Makes the batches of models that find the edges of molecules by themselves, and are trained in eV and Å."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(getattr(model, "representation_model", model).cutoff))
        self.symbols = embedded_symbols(model)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the batch of one molecule.

        Raises:
            ValueError: The structure is periodic.
        """
        species_index(atoms, self.symbols, "the structure", TRAINED)
        if atoms.pbc.any():
            raise ValueError(
                f"the structure is periodic, pbc={atoms.pbc.tolist()}; the models of PyTorch Geometric take "
                "molecules only"
            )
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "cell": cell_of(atoms, dtype),
            "z": torch.tensor(atoms.numbers, dtype=torch.int64),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
        }

    @override
    def energies(self, potential: nn.Module, batch: Mapping[str, Any], positions: Tensor, cell: Tensor) -> Tensor:
        output = potential(batch["z"], positions, batch["batch"])
        return output[0] if isinstance(output, tuple) else output
