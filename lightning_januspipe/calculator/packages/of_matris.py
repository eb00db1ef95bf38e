"""Makes the graphs of MatRIS and CHGNet, which number undirected edges, and list the angles of short edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import embedded_symbols
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index
from lightning_januspipe.models.line_graph import LineGraph, line_graph


class MatRISAtomsAdapter(AtomsAdapter):
    """Makes the graphs of MatRIS, whose stress is in GPa."""

    angles = "line_graph"
    """Name of the list of angles."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.graph_converter.atom_graph_cutoff))
        self.angle_cutoff = float(getattr(model.graph_converter, f"{self.angles}_cutoff"))
        self.symbols = embedded_symbols(model, hydrogen=0)
        self.intensive = bool(model.is_intensive)

    def graph(self, **attributes: Any) -> Any:
        """Returns a graph of the package.

        Raises:
            ValueError: There are no edges.
        """
        from matris.graph import RadiusGraph

        if not len(attributes["atom_graph"]):
            raise ValueError(
                f"no two of its {len(attributes['atomic_number'])} atoms are within {self.cutoff} Å; of such a "
                "structure MatRIS has no energy"
            )
        return RadiusGraph(**attributes)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        species_index(atoms, self.symbols, "the structure", TRAINED)
        cell = np.array(atoms.cell.complete()) if atoms.pbc.any() else np.eye(3)
        edges, found = paired_line_graph(edges, len(atoms), self.angle_cutoff)
        source, target = torch.from_numpy(edges.edge_index)
        arms = [index for arm in (found.edge, found.other) for index in (found.undirected[arm], arm)]
        integers = {
            "atomic_number": torch.tensor(atoms.numbers),
            "atom_graph": torch.stack([target, source], dim=1),
            "directed2undirected": found.undirected,
            "undirected2directed": found.directed,
            self.angles: torch.stack([target[found.edge], *arms], dim=1),
        }
        return self.graph(
            **{name: index.to(torch.int32) for name, index in integers.items()},
            atom_frac_coord=torch.tensor(np.linalg.solve(cell.T, atoms.positions.T).T, dtype=dtype, requires_grad=True),
            lattice=torch.tensor(cell, dtype=dtype),
            neighbor_image=torch.tensor(edges.cell_shifts, dtype=dtype),
            atom_graph_cutoff=self.cutoff,
            graph_id=None,
            mp_id=None,
            composition=None,
            **{f"{self.angles}_cutoff": self.angle_cutoff},
        )

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential([batch], task="efs")

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        (forces,), (stress,) = output["f"], output["s"]
        energy = output["e"] * (len(forces) if self.intensive else 1)
        return {"energy": energy, "forces": forces, "stress": stress * units.GPa}


class CHGNetAtomsAdapter(MatRISAtomsAdapter):
    """Makes the graphs of CHGNet's own package, which are those of MatRIS under other names."""

    angles = "bond_graph"

    @override
    def graph(self, **attributes: Any) -> Any:
        from chgnet.graph import CrystalGraph

        return CrystalGraph(**attributes)


def paired_line_graph(edges: Edges, num_atoms: int, angle_cutoff: float) -> tuple[Edges, LineGraph]:
    """Returns the edges whose opposite is there too, which rounding may leave out at the cutoff, and their line graph.

    Args:
        edges: Neighbour list.
        num_atoms: Number of atoms.
        angle_cutoff: Length in Å below which edges have angles.
    """
    is_near = torch.from_numpy(np.linalg.norm(edges.vectors, axis=1) < angle_cutoff)
    found = line_graph(torch.from_numpy(edges.edge_index), torch.from_numpy(edges.cell_shifts), is_near, num_atoms)
    paired = (torch.bincount(found.undirected)[found.undirected] == 2).numpy()
    if paired.all():
        return edges, found
    rest = Edges(edges.edge_index[:, paired], edges.cell_shifts[paired], edges.vectors[paired])
    return paired_line_graph(rest, num_atoms, angle_cutoff)
