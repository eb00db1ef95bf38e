"""Makes the batches of potentials of NewtonNet."""

from __future__ import annotations

from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import cell_of, embedded_symbols
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class NewtonNetAtomsAdapter(AtomsAdapter):
    """Makes the batches of NewtonNet, which takes the vectors of edges, of models trained in eV and Å.

    Raises:
        ValueError: The model infers no energy.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.embedding_layer.norm.r))
        if "energy" not in model.infer_properties:
            raise ValueError(f"the model of NewtonNet infers {list(model.infer_properties)}; expected 'energy' too")
        self.symbols = embedded_symbols(model)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species_index(atoms, self.symbols, "the structure", TRAINED)
        return {
            "z": torch.tensor(atoms.numbers, dtype=torch.int64),
            "disp": torch.tensor(-edges.vectors, dtype=dtype),  # r_i - r_j
            "edge_index": torch.from_numpy(edges.edge_index[::-1].copy()),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
            "cell": cell_of(atoms, dtype),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        vectors = batch["disp"].detach().clone().requires_grad_(True)
        output = potential(batch["z"], vectors, batch["edge_index"], batch["batch"])
        if not hasattr(output, "pairwise_force"):  # a model that infers neither forces nor the virial
            output.pairwise_force = -torch.autograd.grad([output.energy.sum()], [vectors])[0]
        return output

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        of_edges, (first, second) = output.pairwise_force, batch["edge_index"]
        forces = of_edges.new_zeros(len(batch["z"]), 3).index_add(0, first, of_edges).index_add(0, second, -of_edges)
        found = {"energy": output.energy, "forces": forces}
        volume = torch.linalg.det(batch["cell"]).abs()
        if bool(volume > 0):
            virial = -batch["disp"].T @ of_edges
            found["stress"] = (virial + virial.T) / (2 * volume)
        return found
