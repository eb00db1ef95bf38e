"""Makes the batches of potentials of AIMNet2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED
from lightning_januspipe.calculator.packages.package_parts import EnergyAtomsAdapter, cell_of, charge_of, symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.neighbors import Ints
from lightning_januspipe.data.structures import species_index


class AIMNet2AtomsAdapter(EnergyAtomsAdapter):
    """Makes the batches of AIMNet2's models: a matrix of neighbours, or all pairs for terms of long range.

    Raises:
        ValueError: The model's energy is not whole without modules of AIMNet2's calculator, or it has spin charges.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(max(float(model.aev.rc_s), float(getattr(model.aev, "rc_v", 0.0))))
        metadata = getattr(model, "metadata", None) or {}
        missing = [name for name in ("needs_coulomb", "needs_dispersion") if metadata.get(name)]
        if missing or model.num_charge_channels != 1:
            what = " and ".join(missing) or f"num_charge_channels={model.num_charge_channels}"
            raise ValueError(f"{what} of the model of AIMNet2 is only known to its AIMNet2Calculator; use that")
        numbers = metadata.get("implemented_species") or range(1, model.afv.num_embeddings)
        self.symbols = symbols_of(int(number) for number in numbers)
        self.long_range = any(type(part).__module__ == "aimnet.modules.lr" for part in model.modules())

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the batch of one structure.

        Raises:
            ValueError: The structure is periodic, and the model has terms of long range.
        """
        species_index(atoms, self.symbols, "the structure", TRAINED)
        batch = {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "cell": cell_of(atoms, dtype),
            "numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
            "charge": torch.tensor([charge_of(atoms)], dtype=dtype),
        }
        if self.long_range and atoms.pbc.any():
            raise ValueError(
                "the structure is periodic, and the model of AIMNet2 has terms of long range; no pbc expected"
            )
        if self.long_range:
            return batch
        neighbors, shifts = _neighbor_matrix(edges, len(atoms))
        return batch | {"nbmat": torch.from_numpy(neighbors), "shifts": torch.tensor(shifts, dtype=dtype)}

    @override
    def energies(self, potential: nn.Module, batch: Mapping[str, Any], positions: Tensor, cell: Tensor) -> Tensor:
        numbers, charge = batch["numbers"], batch["charge"]
        if "nbmat" not in batch:
            data = {"coord": positions[None], "numbers": numbers[None], "charge": charge}
        else:  # the last atom is padding
            data = {
                "coord": nn.functional.pad(positions, (0, 0, 0, 1)),
                "numbers": nn.functional.pad(numbers, (0, 1)),
                "charge": charge,
                "nbmat": batch["nbmat"],
                "shifts": batch["shifts"],
                "cell": cell,
                "mol_idx": torch.zeros(numbers.shape[0] + 1, dtype=torch.int64, device=numbers.device),
            }
        return potential(data)["energy"]


def _neighbor_matrix(edges: Edges, num_atoms: int) -> tuple[Ints, Ints]:
    """Returns the neighbours (N + 1, M) of the atoms, N where there is none, and their shifts (N + 1, M, 3)."""
    source, target = edges.edge_index
    counts = np.bincount(target, minlength=num_atoms)
    order = np.argsort(target, kind="stable")
    places = np.arange(len(target)) - np.repeat(np.cumsum(counts) - counts, counts)
    # A structure of twice as many atoms has another width, so that capture takes the width for a size.
    width = max(1, int(counts.max(initial=0))) + num_atoms.bit_length() % 2
    neighbors = np.full((num_atoms + 1, width), num_atoms, dtype=np.int64)
    shifts = np.zeros((num_atoms + 1, width, 3), dtype=np.int64)
    neighbors[target[order], places] = source[order]
    shifts[target[order], places] = edges.cell_shifts[order]
    return neighbors, shifts
