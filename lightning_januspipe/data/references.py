"""Finds the reference energies of atoms: the energies that a model subtracts before it learns the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from ase import Atoms

from lightning_januspipe.data.facts import Facts

References = Literal["auto", "isolated_atoms", "least_squares"]


def is_isolated_atom(atoms: Atoms) -> bool:
    """Returns whether a structure is a lone atom: ``config_type=IsolatedAtom``, or one atom without periodicity."""
    said = str(atoms.info.get("config_type", "")).lower().replace("_", "") == "isolatedatom"
    return said or (len(atoms) == 1 and not atoms.pbc.any())


def isolated_energies(facts: Sequence[Facts], symbols: Sequence[str]) -> dict[str, float]:
    """Returns the energies of isolated atoms in eV, by chemical symbol.

    Args:
        facts: Structures of which :func:`is_isolated_atom` holds.
        symbols: Chemical symbol of the first atom of each.

    Raises:
        ValueError: A structure has several atoms or neighbours, or an element has two different energies.
    """
    found: dict[str, Facts] = {}
    for one, symbol in zip(facts, symbols, strict=True):
        if one.num_atoms > 1 or one.num_edges:
            what = f"{one.num_atoms} atoms" if one.num_atoms > 1 else "periodic images within the cutoff"
            raise ValueError(f"{one.name} is an isolated atom by its config_type, but has {what}; correct one of them")
        if not np.isfinite(one.energy):
            continue
        first = found.setdefault(symbol, one)
        if abs(first.energy - one.energy) > 1e-4:
            raise ValueError(
                f"{first.name} and {one.name} are isolated atoms of {symbol} with different energies, {first.energy} "
                f"and {one.energy} eV; remove one of them"
            )
    return {symbol: one.energy for symbol, one in found.items()}


def choose_references(
    how: References | Mapping[str, float], isolated: Mapping[str, float], species: Sequence[str]
) -> list[float | None]:
    """Returns the known reference energy of each species in eV, None for those that a fit has to find.

    Args:
        how: ``"isolated_atoms"`` for those of isolated atoms, ``"least_squares"`` for a fit, ``"auto"`` for isolated
            atoms as far as there are any and a fit of the others, or the energies in eV by chemical symbol.
        isolated: Energies of isolated atoms in eV, by chemical symbol.
        species: Chemical symbols by species index.

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
            f"reference_energies='isolated_atoms', but there is no isolated atom of {', '.join(lacking)} in the "
            "training file: expected a frame of one atom with config_type=IsolatedAtom, or reference_energies='auto' "
            "to fit the energies of the others"
        )
    return [known.get(symbol) for symbol in species]
