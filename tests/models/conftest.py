from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from torch import Tensor

from lightning_januspipe import keys

SPECIES = ["H", "O", "Cu", "Au"]
CUTOFF = 3.5

Batch = dict[str, Tensor]
MakeBatch = Callable[..., Batch]


def structure(index: int) -> Atoms:
    """A rattled crystal (even index) or molecule (odd index)."""
    kind = index % 4
    if kind == 0:
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[0] = "Au"
    elif kind == 1:
        atoms = molecule("H2O")
    elif kind == 2:
        atoms = bulk("Au")
    else:
        atoms = molecule("H2O2")
    atoms.rattle(0.05, seed=index)
    return atoms


@pytest.fixture
def make_structure() -> Callable[[int], Atoms]:
    return structure


@pytest.fixture
def make_batch() -> MakeBatch:
    """Batch of ASE structures, with EMT labels if ``labels``; floats have the default dtype."""

    def make(structures: Sequence[Atoms], labels: bool = False) -> Batch:
        dtype = torch.get_default_dtype()
        parts: dict[str, list[np.ndarray]] = {
            name: []
            for name in ("positions", "species", "edges", "shifts", "cell", "batch", "energy", "forces", "stress")
        }
        offset = 0
        for index, atoms in enumerate(structures):
            target, source, shifts = neighbor_list("ijS", atoms, CUTOFF)
            parts["positions"].append(atoms.positions)
            parts["species"].append(np.array([SPECIES.index(symbol) for symbol in atoms.symbols]))
            parts["edges"].append(np.stack([source, target]) + offset)
            parts["shifts"].append(shifts)
            parts["cell"].append(atoms.cell.array[None])
            parts["batch"].append(np.full(len(atoms), index))
            if labels:
                atoms = atoms.copy()
                atoms.calc = EMT()
                parts["energy"].append(np.array([atoms.get_potential_energy()]))
                parts["forces"].append(atoms.get_forces())
                stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else np.full((3, 3), np.nan)
                parts["stress"].append(stress[None])
            offset += len(atoms)
        joined = {
            name: torch.from_numpy(np.concatenate(part, axis=1 if name == "edges" else 0))
            for name, part in parts.items()
            if part
        }
        batch = {
            keys.POSITIONS: joined["positions"].to(dtype),
            keys.SPECIES: joined["species"].long(),
            keys.EDGE_INDEX: joined["edges"].long(),
            keys.CELL_SHIFTS: joined["shifts"].to(dtype),
            keys.CELL: joined["cell"].to(dtype),
            keys.BATCH: joined["batch"].long(),
        }
        if labels:
            batch |= {name: joined[name].to(dtype) for name in (keys.ENERGY, keys.FORCES, keys.STRESS)}
        return batch

    return make


@pytest.fixture
def make_potential():
    """Small potential for the structures of this folder."""
    from lightning_januspipe.models import EquivariantPotential

    def make(**kwargs) -> EquivariantPotential:
        torch.manual_seed(0)
        arguments = {
            "species": SPECIES,
            "cutoff": CUTOFF,
            "num_layers": 3,
            "num_features": 6,
            "l_max": 2,
            "num_bessel": 4,
            "radial_hidden": [8],
            "avg_num_neighbors": 6.0,
            "per_species_shift": [-1.0, -2.0, -3.0, -4.0],
            **kwargs,
        }
        return EquivariantPotential(**arguments)

    return make
