"""Makes the graphs of Orb's conservative potentials."""

from __future__ import annotations

import copy
from typing import Any

import torch
from ase import Atoms
from torch import Tensor
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.calculator.adapter import AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import double_for_float
from lightning_januspipe.calculator.skin import Edges


class OrbAtomsAdapter(AtomsAdapter):
    """Makes the graphs of Orb by its own search, which limits the number of neighbours.

    Raises:
        ValueError: The model has no configuration of its graphs.
    """

    def __init__(self, model: Any) -> None:
        if model.system_config is None:
            raise ValueError("the model of Orb has no system_config, which tells how its graphs are made")
        super().__init__(float(model.system_config.radius))
        self.system_config = model.system_config
        # A copy, as parameters of the potential count for its own forward only.
        self.energy_head = copy.deepcopy(model.heads[model.energy_name]).eval().requires_grad_(False)
        self.has_charge = hasattr(model.model.conditioner, "charge_embedding")

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        """Returns the graph of one structure.

        Raises:
            ValueError: The structure is periodic in some directions only, or charge or spin are missing.
        """
        from orb_models.forcefield.atomic_system import ase_atoms_to_atom_graphs

        if atoms.pbc.any() and not atoms.pbc.all():
            raise ValueError(f"pbc={atoms.pbc.tolist()}; Orb takes structures with three periodic directions or none")
        info = {name: atoms.info[name] for name in (keys.CHARGE, keys.SPIN) if name in atoms.info}
        if self.has_charge and len(info) < 2:
            raise ValueError(f"Atoms.info has {list(info)} only; this model of Orb expects 'charge' and 'spin'")
        plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        plain.info = info if self.has_charge else {}
        return ase_atoms_to_atom_graphs(
            plain,
            system_config=self.system_config,
            device=torch.device("cpu"),
            output_dtype=dtype,
            graph_construction_dtype=torch.float64,
        )

    @override
    def call(self, potential: Any, batch: Any) -> Any:
        graphs = batch._replace(  # its forward changes what it gets
            node_features={**batch.node_features, "positions": batch.positions.detach().clone()},
            edge_features=dict(batch.edge_features),
            system_features=dict(batch.system_features),
        )
        with double_for_float(batch.positions.dtype):
            return potential(graphs)

    @override
    def results(self, potential: Any, batch: Any, output: Any) -> dict[str, Tensor]:
        normalized = output[potential.energy_name]
        energy = self.energy_head.to(normalized).denormalize(normalized, batch)
        found = {"energy": energy, "forces": output[potential.grad_forces_name]}
        if potential.has_stress:
            xx, yy, zz, yz, xz, xy = output[potential.grad_stress_name].reshape(6)
            found["stress"] = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).reshape(3, 3)
        return found
