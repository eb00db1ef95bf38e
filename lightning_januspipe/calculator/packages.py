"""Makes the batches of potentials of other packages: MACE, NequIP and Allegro, SchNetPack, MatGL, SevenNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
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
        self.symbols = [Atoms([number]).get_chemical_symbols()[0] for number in model.atomic_numbers.tolist()]
        heads = list(getattr(model, "heads", ["Default"]))
        if head not in heads and (head is not None or len(heads) > 1):
            raise ValueError(f"head={head!r}; the model has {heads}: give adapter=MACEAtomsAdapter(model, head=...)")
        self.head = 0 if head is None else heads.index(head)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species = torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED))
        cell = _cell(atoms, dtype)
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
            "cell": _cell(atoms, dtype)[None],
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


class SchNetPackAtomsAdapter(AtomsAdapter):
    """Makes the batches of SchNetPack, whose outputs are ``energy``, ``forces`` and ``stress`` in eV and Å."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.representation.cutoff))

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        source, target = torch.from_numpy(edges.edge_index)
        cell = _cell(atoms, dtype)
        return {
            "_idx": torch.tensor([0]),
            "_n_atoms": torch.tensor([len(atoms)]),
            "_atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
            "_positions": torch.tensor(atoms.positions, dtype=dtype),
            "_cell": cell[None],
            "_pbc": torch.tensor(atoms.pbc),
            "_idx_i": target,
            "_idx_j": source,
            "_idx_m": torch.zeros(len(atoms), dtype=torch.int64),
            "_offsets": torch.tensor(edges.cell_shifts, dtype=dtype) @ cell,
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential(dict(batch))


class MatGLAtomsAdapter(AtomsAdapter):
    """Makes the graphs of MatGL, whose stress is in GPa."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.model.cutoff))
        self.symbols = list(model.model.element_types)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        from torch_geometric.data import Data

        cell = np.array(atoms.cell.complete()) if atoms.pbc.any() else np.eye(3)
        graph = Data(
            num_nodes=len(atoms),
            edge_index=torch.from_numpy(edges.edge_index[::-1].copy()),
            pbc_offset=torch.tensor(edges.cell_shifts, dtype=dtype),
            node_type=torch.from_numpy(species_index(atoms, self.symbols, "the structure", TRAINED)),
            frac_coords=torch.tensor(np.linalg.solve(cell.T, atoms.positions.T).T, dtype=dtype),
        )
        return graph, torch.tensor(cell, dtype=dtype)[None], torch.zeros(2, dtype=dtype)

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        graph, lattice, state = batch
        return potential(g=graph, lat=lattice, state_attr=state)

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        energy, forces, stress = output[:3]
        return {"energy": energy, "forces": forces, "stress": stress * units.GPa}


class SevenNetAtomsAdapter(AtomsAdapter):
    """Makes the batches of SevenNet's models of one modality."""

    def __init__(self, model: Any) -> None:
        super().__init__(float(model.cutoff))
        self.symbols = [Atoms([number]).get_chemical_symbols()[0] for number in model.type_map]

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species_index(atoms, self.symbols, "the structure", TRAINED)
        numbers = torch.tensor(atoms.numbers, dtype=torch.int64)
        return {
            "x": numbers,
            "atomic_numbers": numbers,
            "pos": torch.tensor(atoms.positions, dtype=dtype),
            "edge_index": torch.from_numpy(edges.edge_index[::-1].copy()),
            "edge_vec": torch.tensor(edges.vectors, dtype=dtype),
            "cell_volume": torch.tensor([atoms.cell.volume], dtype=dtype),
            "num_atoms": torch.tensor([len(atoms)]),
            "batch": torch.zeros(len(atoms), dtype=torch.int64),
        }

    @override
    def call(self, potential: nn.Module, batch: Any) -> Any:
        return potential({**batch, "edge_vec": batch["edge_vec"].clone(), "cell_volume": batch["cell_volume"].clone()})

    @override
    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        xx, yy, zz, xy, yz, zx = -output["inferred_stress"].reshape(6)
        stress = torch.stack([xx, xy, zx, xy, yy, yz, zx, yz, zz]).reshape(3, 3)
        return {
            "energy": output["inferred_total_energy"],
            "forces": output["inferred_force"],
            "stress": stress,
            "energies": output["atomic_energy"],
        }


_OF_CLASSES: Mapping[tuple[str, str], type[Any]] = {
    ("mace", "MACE"): MACEAtomsAdapter,
    ("nequip", "GraphModel"): NequIPAtomsAdapter,
    ("schnetpack", "NeuralNetworkPotential"): SchNetPackAtomsAdapter,
    ("matgl", "Potential"): MatGLAtomsAdapter,
    ("sevenn", "AtomGraphSequential"): SevenNetAtomsAdapter,
}
"""Adapters by the package and the name of a class of potentials."""


def known_potential(module: nn.Module) -> tuple[nn.Module, AtomsAdapter] | None:
    """Returns the outermost potential of a known package in a module, with its adapter; None if there is none."""
    for part in module.modules():
        for of in type(part).__mro__:
            adapter = _OF_CLASSES.get((of.__module__.partition(".")[0], of.__name__))
            if adapter is not None:
                return part, adapter(part)
    return None


def _cell(atoms: Atoms, dtype: torch.dtype) -> Tensor:
    """Returns the cell (3, 3) in Å; zeros without periodic directions."""
    return torch.tensor(atoms.cell.array * bool(atoms.pbc.any()), dtype=dtype)
