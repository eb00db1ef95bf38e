"""Small structures of three metals, labelled with ASE's EMT, for the programs beside this file."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

SYMBOLS = ("Al", "Cu", "Ni")
CUTOFF = 4.0


def crystal(index: int, rng: np.random.Generator) -> Atoms:
    """Returns a rattled, strained fcc cell of 4, 8 or 16 atoms."""
    atoms = bulk("Cu", "fcc", a=3.75, cubic=True) * [(1, 1, 1), (2, 1, 1), (2, 2, 1)][index % 3]
    strain = 0.02 * rng.standard_normal((3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
    return atoms


def molecule(index: int, rng: np.random.Generator) -> Atoms:
    """Returns a cluster of 3 to 7 atoms without a cell."""
    atoms = (bulk("Cu", "fcc", a=3.75, cubic=True) * (2, 1, 1))[: 3 + index % 5]
    return Atoms(atoms.numbers, atoms.positions)


def lone(index: int, rng: np.random.Generator) -> Atoms:
    """Returns one atom, which has no edges, for every second index, and a molecule for the others."""
    return Atoms("Cu", [[0.0, 0.0, 0.0]]) if index % 2 else molecule(index, rng)


KINDS = {"crystals": crystal, "molecules": molecule, "lone": lone}


def labelled(kind: str, number: int) -> list[Atoms]:
    """Returns randomly occupied structures with energy (eV), forces (eV/Å) and, of crystals, stress (eV/Å³)."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(number):
        atoms = KINDS[kind](index, rng)
        atoms.set_chemical_symbols([str(s) for s in rng.choice(SYMBOLS, len(atoms))])
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if kind == "crystals":
            labels["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **labels)
        made.append(atoms)
    return made
