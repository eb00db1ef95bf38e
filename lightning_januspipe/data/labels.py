"""Finds the labels of structures: energy, forces and stress, under names and in units that the user chooses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from lightning_januspipe import keys
from lightning_januspipe.data.units import unit_factor

Floats = NDArray[np.float64]

_ASYMMETRY = 0.05
"""Largest asymmetry of a stress label relative to its largest component; more is a wrong order of components."""


@dataclass(frozen=True)
class LabelKeys:
    """Holds the names under which structures have their labels, and the units of these.

    Names are looked up in the results of the calculator that is attached to the ``Atoms`` (where ``ase.io`` puts
    energy, forces and stress), then in ``Atoms.info`` and ``Atoms.arrays`` (where it puts everything else, for instance
    ``REF_energy``).

    Attributes:
        energy_key: Name of the energy of the structure; None to read none.
        forces_key: Name of the (N, 3) forces; None to read none.
        stress_key: Name of the stress in ASE's sign, positive under tension, as (6,) in the order xx, yy, zz, yz, xz,
            xy, as (3, 3) or as (9,); None to read none.
        virial_key: Name of the virial of the structure in ``energy_unit`` and in the same shapes; its stress is
            -virial / volume. None to read none. Where a structure has both, they have to agree.
        energy_unit: Unit of energies and virials.
        forces_unit: Unit of forces.
        stress_unit: Unit of stresses.

    Raises:
        ValueError: A unit is unknown, ``stress_key`` names a virial, or ``forces_key`` a gradient.
    """

    energy_key: str | None = "energy"
    forces_key: str | None = "forces"
    stress_key: str | None = "stress"
    virial_key: str | None = None
    energy_unit: str = "eV"
    forces_unit: str = "eV/Å"
    stress_unit: str = "eV/Å³"

    def __post_init__(self) -> None:
        for kind in ("energy", "forces", "stress"):
            self.factor(kind)
        if self.stress_key is not None and "virial" in self.stress_key.lower():
            raise ValueError(
                f"stress_key={self.stress_key!r} names a virial, which is -stress × volume; use virial_key for it, and "
                "stress_key=None"
            )
        if self.forces_key is not None and "grad" in self.forces_key.lower():
            raise ValueError(
                f"forces_key={self.forces_key!r} names a gradient, and forces are minus the gradient of the energy; "
                "store the forces under another name"
            )

    def factor(self, kind: Any) -> float:
        """Returns the number of eV, eV/Å or eV/Å³ in the unit of ``"energy"``, ``"forces"`` or ``"stress"``."""
        return unit_factor(kind, getattr(self, f"{kind}_unit"))

    def key_of(self, quantity: str) -> str | None:
        """Returns the name of the label of a quantity, for messages."""
        name: str | None = getattr(self, f"{quantity}_key")
        return self.virial_key if name is None and quantity == keys.STRESS else name


def read_labels(atoms: Atoms, names: LabelKeys, *, required: bool, source: str) -> dict[str, Floats]:
    """Reads the labels of one structure.

    A structure of one atom needs no forces label: its forces are zero.

    Args:
        atoms: Structure of N atoms.
        names: Where the labels are, and in which units.
        required: Whether energy and forces must be there, as far as ``names`` has a name for them.
        source: Name of the structure in error messages.

    Returns:
        ``energy`` () in eV, ``forces`` (N, 3) in eV/Å and ``stress`` (3, 3) in eV/Å³; all NaN where there is no label.
        A structure whose cell has no volume has no stress.

    Raises:
        ValueError: A required label is missing, a label has the wrong shape, is NaN or infinite, was computed for other
            positions, or is there twice with different values.
    """
    return {
        keys.ENERGY: _energy(atoms, names, required, source),
        keys.FORCES: _forces(atoms, names, required, source),
        keys.STRESS: _stress(atoms, names, source),
    }


def available_keys(atoms: Atoms) -> Iterator[str]:
    """Yields the names of everything that a structure holds beside its geometry, with where it is held."""
    for place, values in _places(atoms):
        for name in values:
            if place != "arrays" or name not in ("numbers", "positions"):
                yield f"{name!r} ({place})"


def _energy(atoms: Atoms, names: LabelKeys, required: bool, source: str) -> Floats:
    array = _find(atoms, names.energy_key, keys.ENERGY, required, source)
    if array is None:
        return np.array(np.nan)
    if array.size != 1:
        raise ValueError(
            f"{source}: energy label {names.energy_key!r} has shape {array.shape}; expected one number, the energy of "
            "the structure"
        )
    return array.reshape(()) * names.factor("energy")


def _forces(atoms: Atoms, names: LabelKeys, required: bool, source: str) -> Floats:
    is_alone = len(atoms) == 1 and names.forces_key is not None
    array = _find(atoms, names.forces_key, keys.FORCES, required and not is_alone, source)
    if array is None:
        return np.full((len(atoms), 3), 0.0 if is_alone else np.nan)
    if array.shape != (len(atoms), 3):
        raise ValueError(
            f"{source}: forces label {names.forces_key!r} has shape {array.shape}; expected {(len(atoms), 3)}, one row "
            "for each atom"
        )
    return array * names.factor("forces")


def _stress(atoms: Atoms, names: LabelKeys, source: str) -> Floats:
    volume = abs(float(np.linalg.det(atoms.cell.array))) if atoms.pbc.any() else 0.0
    if not volume:  # stress is per volume: without one, a label has no meaning, even if a calculator returns it
        return np.full((3, 3), np.nan)
    stress = _find(atoms, names.stress_key, keys.STRESS, False, source)
    virial = _find(atoms, names.virial_key, "virial", False, source)
    found = []
    if stress is not None:
        found.append(_matrix(stress, names.stress_key, "stress", source) * names.factor("stress"))
    if virial is not None:
        found.append(-_matrix(virial, names.virial_key, "virial", source) * names.factor("energy") / volume)
    if len(found) == 2 and not np.allclose(found[0], found[1], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{source}: stress {names.stress_key!r} and virial {names.virial_key!r} disagree: {found[0].tolist()} and "
            f"{found[1].tolist()} eV/Å³. Set one of stress_key and virial_key to None, or correct a unit"
        )
    return found[0] if found else np.full((3, 3), np.nan)


def _matrix(array: Floats, name: str | None, label: str, source: str) -> Floats:
    if array.shape in ((1, 6), (1, 3, 3), (1, 9)):
        array = array[0]
    if array.shape == (6,):
        xx, yy, zz, yz, xz, xy = array
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if array.shape not in ((3, 3), (9,)):
        raise ValueError(
            f"{source}: {label} label {name!r} has shape {array.shape}; expected (6,) (xx, yy, zz, yz, xz, xy), (3, 3) "
            "or (9,)"
        )
    matrix = array.reshape(3, 3)
    if np.abs(matrix - matrix.T).max() > _ASYMMETRY * np.abs(matrix).max():
        raise ValueError(
            f"{source}: {label} label {name!r} is not symmetric: {matrix.tolist()}. Its components are in another "
            "order than xx, xy, xz, yx, yy, yz, zx, zy, zz"
        )
    return matrix


def _find(atoms: Atoms, name: str | None, label: str, required: bool, source: str) -> Floats | None:
    """Returns the finite numbers under a name, as they are; None where there is no such name."""
    if name is None:
        return None
    found = [(place, values[name]) for place, values in _places(atoms) if values.get(name) is not None]
    if not found:
        if required:
            raise ValueError(
                f"{source} has no {label} label {name!r}. Keys found: {', '.join(available_keys(atoms)) or 'none'}. "
                f"Set `{label}_key` to the one that holds the {label}, or require_labels=False to leave out what is "
                "missing."
            )
        return None
    if found[0][0] == "results":
        _check_not_stale(atoms, name, label, source)
    arrays = [_as_array(value, name, source) for _, value in found]
    for (place, _), array in zip(found[1:], arrays[1:], strict=True):
        both = [arrays[0].ravel(), array.ravel()]
        if label in (keys.STRESS, "virial"):  # which may be there in two shapes
            both = [_matrix(one, name, label, source).ravel() for one in both]
        if both[0].size != both[1].size or not np.allclose(both[0], both[1], equal_nan=True):
            raise ValueError(
                f"{source} has two different labels {name!r}, in {found[0][0]} and in {place}; remove one of them"
            )
    bad = int((~np.isfinite(arrays[0])).sum())
    if bad:
        raise ValueError(
            f"{source}: label {name!r} has NaN or infinite values ({bad} of {arrays[0].size}). Remove the structure or "
            "correct the label."
        )
    return arrays[0]


def _places(atoms: Atoms) -> list[tuple[str, dict[str, Any]]]:
    results = getattr(atoms.calc, "results", {})
    return [("results", results), ("info", atoms.info), ("arrays", atoms.arrays)]


def _check_not_stale(atoms: Atoms, name: str, label: str, source: str) -> None:
    # A calculator keeps its results when atoms move, and check_state finds that.
    if getattr(atoms.calc, "atoms", None) is None or not hasattr(atoms.calc, "check_state"):
        return
    changes = [change for change in atoms.calc.check_state(atoms) if change in ("positions", "numbers", "cell", "pbc")]
    if changes:
        raise ValueError(
            f"{source}: the calculator's {label} {name!r} was computed for other {', '.join(changes)} than the "
            "structure has. Compute it again, or store it in Atoms.info or Atoms.arrays and remove the calculator."
        )


def _as_array(value: Any, name: str, source: str) -> Floats:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: label {name!r} is {value!r}; expected numbers") from error
