"""Converts the units of labels to eV, eV/Å and eV/Å³."""

from __future__ import annotations

import re
from typing import Literal

from ase import units

_ENERGIES = {
    "eV": units.eV,
    "meV": 1e-3 * units.eV,
    "Hartree": units.Hartree,
    "Ha": units.Hartree,
    "Rydberg": units.Rydberg,
    "Ry": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}

_LENGTHS = {"Å": 1.0, "Ang": 1.0, "Angstrom": 1.0, "nm": 10.0, "Bohr": units.Bohr}

_PRESSURES = {"GPa": units.GPa, "MPa": 1e-3 * units.GPa, "kbar": 1e3 * units.bar, "bar": units.bar, "Pa": units.Pascal}

_EXAMPLES = {
    "energy": "eV, meV, Hartree, Rydberg, kcal/mol or kJ/mol",
    "forces": "eV/Å, Hartree/Bohr or kcal/mol/Å",
    "stress": "eV/Å³, GPa, kbar or Hartree/Bohr³",
}


def unit_factor(kind: Literal["energy", "forces", "stress"], unit: str) -> float:
    """Returns the number of eV, eV/Å or eV/Å³ in a unit.

    Args:
        kind: The quantity that is measured.
        unit: An energy; for forces an energy per length; for stress an energy per length³ or a pressure. Lengths are
            written ``Å``, ``Ang``, ``nm`` or ``Bohr``, cubes ``Å³``, ``Å^3`` or ``Å**3``.

    Raises:
        ValueError: The unit is unknown, or measures another quantity.

    Example:
        >>> round(unit_factor("forces", "Hartree/Bohr"), 4)
        51.4221
    """
    if kind == "energy" and unit in _ENERGIES:
        return _ENERGIES[unit]
    if kind == "stress" and unit in _PRESSURES:
        return _PRESSURES[unit]
    energy, _, length = unit.rpartition("/")
    exponent = 1 if kind == "forces" else 3
    if exponent == 3:
        length, is_cube = re.subn(r"(³|\^3|\*\*3)$", "", length)
        length = length if is_cube else ""
    if kind != "energy" and energy in _ENERGIES and length in _LENGTHS:
        return _ENERGIES[energy] / _LENGTHS[length] ** exponent
    raise ValueError(f"unit {unit!r} of {kind} labels is unknown; expected one such as {_EXAMPLES[kind]}")
