"""Finds the reference energies of atoms: the energies that a model subtracts before it learns the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from lightning_januspipe.data.facts_table import FactsTable

References = Literal["auto", "isolated_atoms", "least_squares"]


def isolated_energies(facts: FactsTable) -> dict[str, float]:
    """Returns the energies of isolated atoms in eV, by chemical symbol.

    Args:
        facts: The isolated atoms.

    Raises:
        ValueError: A structure has several atoms or neighbours, or an element has two different energies.
    """
    found: dict[str, int] = {}
    rows = facts.rows
    for position in range(len(facts)):
        name, num_atoms, energy = facts.name(position), int(rows["num_atoms"][position]), rows["energy"][position]
        if num_atoms > 1 or rows["num_edges"][position]:
            what = f"{num_atoms} atoms" if num_atoms > 1 else "periodic images within the cutoff"
            raise ValueError(f"{name} is an isolated atom by its config_type, but has {what}; correct one of them")
        if not np.isfinite(energy):
            continue
        symbol = chemical_symbols[next(iter(facts.composition(position)))]
        first = found.setdefault(symbol, position)
        if abs(rows["energy"][first] - energy) > 1e-4:
            raise ValueError(
                f"{facts.name(first)} and {name} are isolated atoms of {symbol} with different energies, "
                f"{rows['energy'][first]} and {energy} eV; remove one of them"
            )
    return {symbol: float(rows["energy"][position]) for symbol, position in found.items()}


def of_task(how: References | Mapping[str, Any], task: str) -> References | Mapping[str, float]:
    """Returns how the reference energies of a task are found, where they may be given by task.

    Raises:
        ValueError: They are given by task, and not for this one.
    """
    if not isinstance(how, Mapping) or not any(isinstance(energies, Mapping) for energies in how.values()):
        return how
    if not isinstance(how.get(task), Mapping):
        raise ValueError(f"reference_energies has nothing for the task {task!r}, only {list(how)}; expected all tasks")
    energies: Mapping[str, float] = how[task]
    return energies


def choose_references(
    how: References | Mapping[str, float],
    isolated: Mapping[str, float],
    species: Sequence[str],
    task: str = "",
) -> list[float | None]:
    """Returns the known reference energy of each species in eV, None for those that a fit has to find.

    Args:
        how: ``"isolated_atoms"`` for those of isolated atoms, ``"least_squares"`` for a fit, ``"auto"`` for isolated
            atoms as far as there are any and a fit of the others, or the energies in eV by chemical symbol.
        isolated: Energies of isolated atoms in eV, by chemical symbol.
        species: Chemical symbols by species index.
        task: Name of the task in messages; empty where there are none.

    Raises:
        ValueError: ``how`` is unknown, or an energy is missing.
    """
    if isinstance(how, Mapping):
        known: Mapping[str, float] = how
    elif how in ("auto", "isolated_atoms"):
        known = isolated
    elif how == "least_squares":
        known = {}
    else:
        raise ValueError(
            f"reference_energies={how!r}; expected 'auto', 'isolated_atoms', 'least_squares' or a mapping from symbols "
            "to energies in eV"
        )
    lacking = [symbol for symbol in species if symbol not in known]
    if lacking and isinstance(how, Mapping):
        raise ValueError(f"reference_energies={dict(how)} has no energy of {', '.join(lacking)}; expected all species")
    if lacking and how == "isolated_atoms":
        raise ValueError(
            f"reference_energies='isolated_atoms', but there is no isolated atom of {', '.join(lacking)}"
            f"{f' with the task {task!r}' if task else ''} in the training file: expected a frame of one atom with "
            "config_type=IsolatedAtom, or reference_energies='auto' to fit the energies of the others"
        )
    return [known.get(symbol) for symbol in species]
