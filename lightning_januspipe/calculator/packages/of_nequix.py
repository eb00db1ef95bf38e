"""Makes the batches of Nequix's model for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class NequixAtomsAdapter(AtomsAdapter):
    """Makes the batches of Nequix's model for torch, which counts its elements and does not know them.

    Args:
        model: The model.
        elements: Their atomic numbers, as in the ``atomic_numbers`` of Nequix's configuration, or their symbols, in
            the order of the model; None for those of an attribute ``atomic_numbers`` of the model.

    Raises:
        ValueError: The elements are not known, or are more or fewer than those of the model.
    """

    def __init__(self, model: Any, elements: Sequence[int | str] | None = None) -> None:
        super().__init__(float(model.cutoff))
        elements = getattr(model, "atomic_numbers", None) if elements is None else elements
        if elements is None or len(elements) != model.n_species:
            raise ValueError(
                f"elements={elements!r}; the model of Nequix has {model.n_species} elements, and does not say which: "
                "give adapter=NequixAtomsAdapter(model, elements=...)"
            )
        self.symbols = [of if isinstance(of, str) else symbols_of([int(of)])[0] for of in elements]

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor | None]:
        cell = torch.tensor(np.array(atoms.cell.complete()), dtype=dtype)[None] if atoms.pbc.any() else None
        return {
            "species": torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED)),
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "edge_attr": torch.tensor(edges.cell_shifts, dtype=dtype),
            "edge_index": torch.from_numpy(edges.edge_index),
            "cell": cell,
            "n_node": torch.tensor([len(atoms)]),
            "n_edge": torch.tensor([edges.edge_index.shape[1]]),
            "n_graph": torch.zeros(len(atoms), dtype=torch.int64),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential(**{**batch, "positions": batch["positions"].detach().clone()})

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        energies, forces, stress = output
        found = {"energy": energies.sum(), "energies": energies, "forces": forces}
        return found | ({} if stress is None else {"stress": stress})
