"""Counts the labels of structures, and finds in them what would go wrong in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from lightning_januspipe.data.facts import QUANTITIES
from lightning_januspipe.data.facts_table import FactsTable
from lightning_januspipe.data.labels import LabelKeys

_FEWEST_TO_JUDGE = 10
"""From this many structures on, energies are compared with numbers of atoms."""

_SAME_ENERGY = 1e-3
"""Energies of one geometry that differ by less than this, in eV per atom, are the same."""

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""Odd factor near 2**64 over the golden ratio: its product with a small integer has other bits everywhere."""


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
    def of(cls, facts: FactsTable, labels: LabelKeys) -> LabelCounts:
        """Counts the labels of structures."""
        names: Counter[str] = Counter()
        for kind, num in zip(facts.kinds, np.bincount(facts.rows["kind"], minlength=len(facts.kinds)), strict=True):
            names.update(dict.fromkeys(kind.available, int(num)))
        total = len(facts)
        found = [(name, num) for name, num in names.most_common() if num]
        available = [name if num == total else f"{name} in {num} of {total}" for name, num in found]
        return cls(
            num_structures=total,
            present={quantity: int(facts.has(quantity).sum()) for quantity in QUANTITIES},
            missing={quantity: int(facts.has(quantity, "missing").sum()) for quantity in QUANTITIES},
            names={quantity: labels.key_of(quantity) for quantity in QUANTITIES},
            available=", ".join(available) or "none",
        )


def suspicions(train: FactsTable) -> Iterator[str]:
    """Yields warnings about the labels of training structures."""
    total, rows = len(train), train.rows
    gaps = np.abs(rows["free_energy_gap"])
    if np.nanmax(gaps, initial=0.0) > 1e-4:
        yield (
            f"{int((gaps > 1e-4).sum())} of {total} structures have a free energy that differs from their energy, "
            f"by up to {np.nanmax(gaps):.4g} eV. Forces are derivatives of the free energy: set energy_key to "
            "free_energy"
        )
    if (zeroed := np.flatnonzero(rows["has_zeroed_forces"])).size:
        yield (
            f"{len(zeroed)} of {total} structures, such as {train.name(zeroed[0])}, have forces of exactly zero on all "
            "atoms with a constraint, which are no derivatives of the energy; expected forces without constraints, as "
            "of get_forces(apply_constraint=False)"
        )
    if (pulled := np.flatnonzero((rows["net_force"] > 0) & ~rows["has_zeroed_forces"])).size:
        worst = pulled[rows["net_force"][pulled].argmax()]
        yield (
            f"the forces of {len(pulled)} of {total} structures do not sum to zero, by up to "
            f"{rows['net_force'][worst]:.3g} eV/Å in {train.name(worst)}, as derivatives of an energy do. Look for "
            "forces of other frames, removed atoms, constraints or external fields"
        )
    several = rows["num_atoms"] > 1
    electrons = {train.kinds[kind].electrons for kind in np.unique(rows["kind"][several])}
    if len(electrons) > 1:
        yield (
            f"structures differ in charge or spin ({'; '.join(sorted(one or 'none given' for one in electrons))}), "
            "which is not an input of the potential: equal geometries would need different energies"
        )
    known = np.flatnonzero(np.isfinite(rows["energy"]) & several)
    energies, num_atoms = rows["energy"][known], rows["num_atoms"][known]
    if len(known) >= _FEWEST_TO_JUDGE:
        spread = _spread(energies)
        if num_atoms.max() >= 2 * num_atoms.min() and spread < 0.2 * min(1.0, _spread(energies / num_atoms)):
            yield (
                f"energies are nearly the same in structures of {num_atoms.min()} and of {num_atoms.max()} atoms, as "
                "energies per atom would be; expected energies of whole structures"
            )
    # The same geometry may have another energy with another task.
    names = [str(kind.info().get("task")) for kind in train.kinds]
    codes = np.unique(names, return_inverse=True)[1].astype(np.uint64)[rows["kind"][known]]
    differing = _differing(rows["digest"][known] ^ (codes * _SPREAD), energies, num_atoms)
    if differing:
        first, second = (train.name(known[position]) for position in differing[0])
        yield (
            f"{len(differing)} training structures occur more than once, with energies that differ by more than "
            f"{1000 * _SAME_ENERGY:g} meV/atom, such as {first} and {second}"
        )


def missing_kinds(train: FactsTable, other: FactsTable) -> str:
    """Describes the kinds of training structures that other data lacks; "" if it lacks none.

    Kinds are elements, periodic and non-periodic structures, values of ``config_type``, and tasks. Lone atoms do not
    count.
    """
    (elements, periodic, types, tasks), (own_elements, own_periodic, own_types, own_tasks) = (
        _kinds(train),
        _kinds(other),
    )
    symbols = [chemical_symbols[number] for number in sorted(elements - own_elements)]
    words = [f"no structure with {', '.join(symbols)}"] if symbols else []
    words += [f"no {'periodic' if kind else 'non-periodic'} structure" for kind in sorted(periodic - own_periodic)]
    words += [f"no structure with config_type={kind!r}" for kind in sorted(types - own_types)]
    words += [f"no structure with task={task!r}" for task in sorted(tasks - own_tasks)]
    return " and ".join(words)


def num_shared(train: FactsTable, other: FactsTable) -> int:
    """Returns how many structures of other data have the geometry of a training structure; lone atoms do not count."""
    shared = np.isin(other.rows["digest"], train.rows["digest"]) & (other.rows["num_atoms"] > 1)
    return int(shared.sum())


def _kinds(facts: FactsTable) -> tuple[set[int], set[bool], set[str], set[str]]:
    chosen = facts.take(facts.rows["num_atoms"] > 1)
    kinds = [facts.kinds[kind] for kind in np.unique(chosen.rows["kind"])]
    types = {kind.config_type for kind in kinds if kind.config_type}
    tasks = {str(kind.info()["task"]) for kind in kinds if "task" in kind.info()}
    return chosen.all_elements(), {kind.is_periodic for kind in kinds}, types, tasks


def _differing(
    digests: NDArray[np.uint64], energies: NDArray[np.float64], num_atoms: NDArray[np.uint32]
) -> list[tuple[int, int]]:
    """Returns the first two structures of each geometry that has different energies, in their order."""
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(digests[order]) != 0)) if len(order) else order
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    found = [group for group in groups if np.ptp(energies[group]) > _SAME_ENERGY * num_atoms[group[0]]]
    return sorted((int(group[0]), int(group[1])) for group in found)


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.std() / max(abs(values.mean()), 1e-12))
