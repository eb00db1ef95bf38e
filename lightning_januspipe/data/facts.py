"""Collects facts about structures, counts their labels, and finds in them what would go wrong in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.data.labels import LabelKeys, available_keys

QUANTITIES = (keys.ENERGY, keys.FORCES, keys.STRESS)

_FEWEST_TO_JUDGE = 10
"""From this many structures on, energies are compared with numbers of atoms."""

_SAME_ENERGY = 1e-3
"""Energies of one geometry that differ by less than this, in eV per atom, are the same."""


_ELECTRONS = ("charge", "total_charge", "spin", "total_spin", "multiplicity", "spin_multiplicity")
"""Names in ``Atoms.info`` of charge and spin, which potentials here do not see."""


@dataclass(frozen=True)
class Facts:
    """Describes one structure.

    Attributes:
        name: Name in messages: file and frame.
        num_atoms: Number of atoms.
        num_edges: Number of edges.
        elements: Atomic numbers.
        is_periodic: Whether any direction is periodic.
        config_type: ``config_type`` in ``Atoms.info``, or "".
        present: Quantities that have a label.
        missing: Quantities that could have a label and have none: forces of a lone atom and the stress of a structure
            without a volume are neither present nor missing.
        energy: Energy in eV, or NaN.
        free_energy_gap: Free energy minus energy in eV where a calculator gives both, otherwise 0.
        net_force: Length of the sum of the forces in eV/Å where it is large beside them, otherwise 0.
        has_zeroed_forces: Whether the forces of atoms with a constraint, and of these only, are exactly zero.
        electrons: Charge and spin in ``Atoms.info``, as text.
        digest: Hash of the geometry.
        available: Names of everything that the structure holds beside its geometry.
    """

    name: str
    num_atoms: int
    num_edges: int
    elements: frozenset[int]
    is_periodic: bool
    config_type: str
    present: frozenset[str]
    missing: frozenset[str]
    energy: float
    free_energy_gap: float
    net_force: float
    has_zeroed_forces: bool
    electrons: str
    digest: bytes
    available: tuple[str, ...]

    @classmethod
    def of(cls, atoms: Atoms, sample: dict[str, Tensor], name: str, labels: LabelKeys) -> Facts:
        """Collects the facts about a structure and its sample."""
        has_volume = bool(atoms.pbc.any()) and bool(sample[keys.CELL].det().abs() > 0)
        meaningless = {keys.FORCES: len(atoms) == 1, keys.STRESS: not has_volume}
        possible = [quantity for quantity in QUANTITIES if not meaningless.get(quantity, False)]
        present = frozenset(quantity for quantity in possible if not sample[quantity].isnan().any())
        energy = float(sample[keys.ENERGY])
        free = getattr(atoms.calc, "results", {}).get("free_energy") if labels.energy_key == "energy" else None
        return cls(
            name=name,
            num_atoms=len(atoms),
            num_edges=sample[keys.EDGE_INDEX].shape[1],
            elements=frozenset(atoms.numbers.tolist()),
            is_periodic=bool(atoms.pbc.any()),
            config_type=str(atoms.info.get("config_type", "")),
            present=present,
            missing=frozenset(possible) - present,
            energy=energy,
            free_energy_gap=0.0 if free is None else float(free) * labels.factor("energy") - energy,
            net_force=_net_force(sample[keys.FORCES]),
            has_zeroed_forces=_has_zeroed_forces(atoms, sample[keys.FORCES]),
            electrons=", ".join(f"{name}={atoms.info[name]}" for name in _ELECTRONS if name in atoms.info),
            digest=_digest(atoms),
            available=tuple(available_keys(atoms)),
        )


@dataclass(frozen=True)
class LabelCounts:
    """Counts the labels of some structures.

    Attributes:
        num_structures: Number of these structures.
        present: Number of structures that have a label, by quantity.
        missing: Number of structures that could have a label and have none, by quantity.
        names: Name under which each quantity is looked up; None for none.
        available: Description of the names that the structures do have.
    """

    num_structures: int
    present: dict[str, int]
    missing: dict[str, int]
    names: dict[str, str | None]
    available: str

    @classmethod
    def of(cls, facts: Sequence[Facts], labels: LabelKeys) -> LabelCounts:
        """Counts the labels of structures."""
        names = Counter(name for one in facts for name in one.available)
        available = [name if n == len(facts) else f"{name} in {n} of {len(facts)}" for name, n in names.most_common()]
        return cls(
            num_structures=len(facts),
            present={quantity: sum(quantity in one.present for one in facts) for quantity in QUANTITIES},
            missing={quantity: sum(quantity in one.missing for one in facts) for quantity in QUANTITIES},
            names={quantity: labels.key_of(quantity) for quantity in QUANTITIES},
            available=", ".join(available) or "none",
        )


def suspicions(train: Sequence[Facts]) -> Iterator[str]:
    """Yields warnings about the labels of training structures."""
    total = len(train)
    gaps = np.array([abs(one.free_energy_gap) for one in train])
    if np.nanmax(gaps, initial=0.0) > 1e-4:
        yield (
            f"{int((gaps > 1e-4).sum())} of {total} structures have a free energy that differs from their energy, "
            f"by up to {np.nanmax(gaps):.4g} eV. Forces are derivatives of the free energy: set energy_key to "
            "free_energy"
        )
    if zeroed := [one.name for one in train if one.has_zeroed_forces]:
        yield (
            f"{len(zeroed)} of {total} structures, such as {zeroed[0]}, have forces of exactly zero on all atoms with "
            "a constraint, which are no derivatives of the energy; expected forces without constraints, as of "
            "get_forces(apply_constraint=False)"
        )
    if pulled := [one for one in train if one.net_force and not one.has_zeroed_forces]:
        worst = max(pulled, key=lambda one: one.net_force)
        yield (
            f"the forces of {len(pulled)} of {total} structures do not sum to zero, by up to {worst.net_force:.3g} "
            f"eV/Å in {worst.name}, as derivatives of an energy do. Look for forces of other frames, removed atoms, "
            "constraints or external fields"
        )
    electrons = {one.electrons for one in train if one.num_atoms > 1}
    if len(electrons) > 1:
        yield (
            f"structures differ in charge or spin ({'; '.join(sorted(one or 'none given' for one in electrons))}), "
            "which is not an input of the potential: equal geometries would need different energies"
        )
    known = [one for one in train if np.isfinite(one.energy) and one.num_atoms > 1]
    if len(known) >= _FEWEST_TO_JUDGE:
        energies = np.array([one.energy for one in known])
        num_atoms = np.array([one.num_atoms for one in known])
        spread = _spread(energies)
        if num_atoms.max() >= 2 * num_atoms.min() and spread < 0.2 * min(1.0, _spread(energies / num_atoms)):
            yield (
                f"energies are nearly the same in structures of {num_atoms.min()} and of {num_atoms.max()} atoms, as "
                "energies per atom would be; expected energies of whole structures"
            )
    same: dict[bytes, list[Facts]] = {}
    for one in known:
        same.setdefault(one.digest, []).append(one)
    differing = [g for g in same.values() if np.ptp([one.energy for one in g]) > _SAME_ENERGY * g[0].num_atoms]
    if differing:
        yield (
            f"{len(differing)} training structures occur more than once, with energies that differ by more than "
            f"{1000 * _SAME_ENERGY:g} meV/atom, such as {differing[0][0].name} and {differing[0][1].name}"
        )


def missing_kinds(train: Sequence[Facts], other: Sequence[Facts]) -> str:
    """Describes the kinds of training structures of which other data holds none; "" if it holds all.

    Kinds are elements, periodic and non-periodic structures, and values of ``config_type``. Lone atoms do not count.
    """
    (elements, periodic, types), (own_elements, own_periodic, own_types) = _kinds(train), _kinds(other)
    symbols = [chemical_symbols[number] for number in sorted(elements - own_elements)]
    words = [f"no structure with {', '.join(symbols)}"] if symbols else []
    words += [f"no {'periodic' if kind else 'non-periodic'} structure" for kind in sorted(periodic - own_periodic)]
    words += [f"no structure with config_type={kind!r}" for kind in sorted(types - own_types)]
    return " and ".join(words)


def num_shared(train: Sequence[Facts], other: Sequence[Facts]) -> int:
    """Returns how many structures of other data have the geometry of a training structure; lone atoms do not count."""
    known = {one.digest for one in train}
    return sum(one.digest in known for one in other if one.num_atoms > 1)


def _kinds(facts: Sequence[Facts]) -> tuple[set[int], set[bool], set[str]]:
    chosen = [one for one in facts if one.num_atoms > 1]
    elements = {number for one in chosen for number in one.elements}
    return elements, {one.is_periodic for one in chosen}, {one.config_type for one in chosen} - {""}


def _net_force(forces: Tensor) -> float:
    """Returns the length of the sum of (N, 3) forces where it is large; 0 for a lone atom."""
    net = float(forces.double().sum(0).norm())
    return net if len(forces) > 1 and net > max(0.1, 0.1 * float(forces.norm(dim=1).max())) else 0.0


def _has_zeroed_forces(atoms: Atoms, forces: Tensor) -> bool:
    """Returns whether constraints were applied to the forces of a structure."""
    fixed = {int(i) for one in atoms.constraints if isinstance(one, FixAtoms) for i in one.index}
    zero = {int(i) for i in (forces == 0).all(dim=1).nonzero()}
    return bool(fixed) and fixed == zero and len(fixed) < len(atoms)


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.std() / max(abs(values.mean()), 1e-12))


def _digest(atoms: Atoms) -> bytes:
    digest = blake2b(digest_size=8)
    for array in (atoms.numbers, np.round(atoms.positions, 5) + 0.0, np.round(atoms.cell.array, 5) + 0.0, atoms.pbc):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
