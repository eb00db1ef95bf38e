"""Collects facts about single structures."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from lightning_januspipe import keys
from lightning_januspipe.data.labels import Floats, LabelKeys, available_keys
from lightning_januspipe.data.structures import StructureArrays
from lightning_januspipe.data.tasks import NAMES

QUANTITIES = (keys.ENERGY, keys.FORCES, keys.STRESS)

_ELECTRONS = ("charge", "total_charge", "spin", "total_spin", "multiplicity", "spin_multiplicity")
"""Names in ``Atoms.info`` of charge and spin, which potentials here do not see."""


@dataclass(frozen=True)
class Facts:
    """Describes one structure.

    Attributes:
        index: Index in its dataset.
        num_atoms: Number of atoms.
        num_edges: Number of edges.
        composition: Atomic numbers in ascending order, each with the number of its atoms.
        is_periodic: Whether any direction is periodic.
        is_isolated: Whether it is an isolated atom, whose energy is a reference energy.
        config_type: ``config_type`` in ``Atoms.info``; None where there is none.
        present: Quantities that have a label.
        missing: Quantities that could have a label and have none: forces of a lone atom and the stress of a structure
            without a volume are neither present nor missing.
        energy: Energy in eV, or NaN.
        free_energy_gap: Free energy minus energy in eV where a calculator gives both, otherwise 0.
        net_force: Length of the sum of the forces in eV/Å where it is large beside them, otherwise 0.
        force_square: Sum of the squares of the force components that are known, in eV²/Å².
        num_forces: Number of force components that are known.
        has_zeroed_forces: Whether the forces of atoms with a constraint, and of these only, are exactly zero.
        electrons: Charge and spin in ``Atoms.info``, as text.
        conditions: ``task``, ``charge`` and ``spin`` in ``Atoms.info``, in this order; None for what is not there.
        own_weight: Factor of the structure's loss that it has itself.
        digest: Hash of the geometry.
        available: Names of everything that the structure holds beside its geometry.
    """

    index: int
    num_atoms: int
    num_edges: int
    composition: tuple[tuple[int, int], ...]
    is_periodic: bool
    is_isolated: bool
    config_type: str | None
    present: frozenset[str]
    missing: frozenset[str]
    energy: float
    free_energy_gap: float
    net_force: float
    force_square: float
    num_forces: int
    has_zeroed_forces: bool
    electrons: str
    conditions: tuple[Any, ...]
    own_weight: float
    digest: int
    available: tuple[str, ...]

    @classmethod
    def of(cls, index: int, atoms: Atoms, arrays: StructureArrays, labels: LabelKeys, own_weight: float) -> Facts:
        """Collects the facts about a structure.

        Args:
            index: Index in the dataset.
            atoms: Structure as it was read.
            arrays: What its sample is made of.
            labels: Names and units of the labels.
            own_weight: Factor of its loss that the structure has itself.
        """
        has_volume = bool(atoms.pbc.any()) and bool(abs(np.linalg.det(arrays.cell)) > 0)
        meaningless = {keys.FORCES: len(atoms) == 1, keys.STRESS: not has_volume}
        possible = [quantity for quantity in QUANTITIES if not meaningless.get(quantity, False)]
        values: dict[str, Any] = {keys.ENERGY: arrays.energy, keys.FORCES: arrays.forces, keys.STRESS: arrays.stress}
        present = frozenset(quantity for quantity in possible if not np.isnan(values[quantity]).any())
        free = getattr(atoms.calc, "results", {}).get("free_energy") if labels.energy_key == "energy" else None
        known = arrays.forces[np.isfinite(arrays.forces)]
        numbers, counts = np.unique(atoms.numbers, return_counts=True)
        return cls(
            index=index,
            num_atoms=len(atoms),
            num_edges=arrays.edge_index.shape[1],
            composition=tuple(zip(numbers.tolist(), counts.tolist(), strict=True)),
            is_periodic=bool(atoms.pbc.any()),
            is_isolated=is_isolated_atom(atoms),
            config_type=None if "config_type" not in atoms.info else str(atoms.info["config_type"]),
            present=present,
            missing=frozenset(possible) - present,
            energy=arrays.energy,
            free_energy_gap=0.0 if free is None else float(free) * labels.factor("energy") - arrays.energy,
            net_force=_net_force(arrays.forces),
            force_square=float((known**2).sum()),
            num_forces=known.size,
            has_zeroed_forces=_has_zeroed_forces(atoms, arrays.forces),
            electrons=", ".join(f"{name}={atoms.info[name]}" for name in _ELECTRONS if name in atoms.info),
            conditions=tuple(_plain(atoms.info.get(name)) for name in NAMES),
            own_weight=own_weight,
            digest=_digest(atoms),
            available=tuple(available_keys(atoms)),
        )


def is_isolated_atom(atoms: Atoms) -> bool:
    """Returns whether a structure is a lone atom: ``config_type=IsolatedAtom``, or one atom without periodicity."""
    said = str(atoms.info.get("config_type", "")).lower().replace("_", "") == "isolatedatom"
    return said or (len(atoms) == 1 and not atoms.pbc.any())


def _plain(value: Any) -> Any:
    """Returns a value of ``Atoms.info`` in a type that can be written as JSON."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _net_force(forces: Floats) -> float:
    """Returns the length of the sum of (N, 3) forces where it is large; 0 for a lone atom."""
    net = float(np.linalg.norm(forces.sum(axis=0)))
    return net if len(forces) > 1 and net > max(0.1, 0.1 * float(np.linalg.norm(forces, axis=1).max())) else 0.0


def _has_zeroed_forces(atoms: Atoms, forces: Floats) -> bool:
    """Returns whether constraints were applied to the forces of a structure."""
    fixed = {int(i) for one in atoms.constraints if isinstance(one, FixAtoms) for i in one.index}
    zero = set(np.flatnonzero((forces == 0).all(axis=1)).tolist())
    return bool(fixed) and fixed == zero and len(fixed) < len(atoms)


def _digest(atoms: Atoms) -> int:
    digest = blake2b(digest_size=8)
    for array in (atoms.numbers, np.round(atoms.positions, 5) + 0.0, np.round(atoms.cell.array, 5) + 0.0, atoms.pbc):
        digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little")
