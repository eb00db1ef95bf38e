"""Makes the batches of potentials of NequIP and Allegro."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import cell_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class NequIPAtomsAdapter(AtomsAdapter):
    """Makes the batches of NequIP and of Allegro."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.metadata["r_max"]))
        self.symbols = list(model.type_names)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "pos": torch.tensor(atoms.positions, dtype=dtype),
            "atom_types": torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED)),
            "edge_index": torch.from_numpy(edges.edge_index[::-1].copy()),
            "edge_cell_shift": torch.tensor(edges.cell_shifts, dtype=dtype),
            "cell": cell_of(atoms, dtype)[None],
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
            "num_atoms": torch.tensor([len(atoms)]),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential(dict(batch))

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        found = {"energy": output["total_energy"], "energies": output["atomic_energy"]}
        return found | {name: output[name] for name in ("forces", "stress") if name in output}
