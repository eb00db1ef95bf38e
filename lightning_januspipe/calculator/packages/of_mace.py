"""Makes the batches of potentials of MACE."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import cell_of, symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class MACEAtomsAdapter(AtomsAdapter):
    """Makes the batches of MACE.

    Args:
        model: The model.
        head: Name of the head; None where there is one.

    Raises:
        ValueError: There is no such head, or several and none is named.
    """

    def __init__(self, model: Any, head: str | None = None) -> None:
        super().__init__(float(model.r_max))
        self.symbols = symbols_of(model.atomic_numbers.tolist())
        heads = list(getattr(model, "heads", ["Default"]))
        if head not in heads and (head is not None or len(heads) > 1):
            raise ValueError(f"head={head!r}; the model has {heads}: give adapter=MACEAtomsAdapter(model, head=...)")
        self.head = 0 if head is None else heads.index(head)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species = torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED))
        cell = cell_of(atoms, dtype)
        unit_shifts = torch.tensor(-edges.cell_shifts, dtype=dtype)  # MACE's vectors are r_i - r_j + shift
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "node_attrs": nn.functional.one_hot(species, len(self.symbols)).to(dtype),
            "edge_index": torch.from_numpy(edges.edge_index),
            "unit_shifts": unit_shifts,
            "shifts": unit_shifts @ cell,
            "cell": cell,
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
            "ptr": torch.tensor([0, len(atoms)]),
            "head": torch.tensor([self.head]),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential(batch, compute_stress=True)

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        return super().results(potential, batch, output) | {"energies": output["node_energy"]}
