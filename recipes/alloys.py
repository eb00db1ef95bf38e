"""Alloys labelled with ASE's EMT, in a file: extended XYZ for most projects, or a database as SchNetPack reads it.

    python recipes/alloys.py alloys.extxyz
    python recipes/alloys.py alloys.db

Energies are in eV, forces in eV/Å, stresses in eV/Å³.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.db import connect
from ase.io import write

from lightning_januspipe.data import emt_structures

UNITS = {"energy": "eV", "forces": "eV/Ang", "stress": "eV/Ang/Ang/Ang"}


def write_database(file: Path, structures: list[Atoms]) -> None:
    """Write an ASE database with labels and units where SchNetPack looks for them."""
    with connect(file, append=False) as database:
        database.metadata = {"_property_unit_dict": UNITS, "_distance_unit": "Ang", "atomrefs": {}}
        for atoms in structures:
            energy, stress = np.array([atoms.get_potential_energy()]), atoms.get_stress(voigt=False)[None]
            database.write(atoms, data={"energy": energy, "forces": atoms.get_forces(), "stress": stress})


def main() -> None:
    """Writes the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="*.extxyz or *.db")
    parser.add_argument("--num-structures", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8], help="multiples of four atoms")
    args = parser.parse_args()
    if args.file.suffix not in (".extxyz", ".xyz", ".db"):
        parser.error(f"{args.file} has no known ending; expected .extxyz or .db")
    structures = emt_structures(args.num_structures, sizes=args.sizes)
    if args.file.suffix == ".db":
        write_database(args.file, structures)
    else:
        write(args.file, structures, format="extxyz")


if __name__ == "__main__":
    main()
