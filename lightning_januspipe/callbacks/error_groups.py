"""Sums errors over groups of structures: all, by element, task, ``config_type`` and number of atoms."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.table import Table

from lightning_januspipe import keys
from lightning_januspipe.callbacks.error_report import format_error
from lightning_januspipe.callbacks.records import Floats, Record

GROUPINGS = {
    "all": "All structures",
    "element": "By element",
    "task": "By task",
    "config_type": "By config_type",
    "size": "By number of atoms",
}
"""The ways to group, in the order of the tables, and their titles."""

_KINDS = ("task", "config_type")
"""Names in ``Atoms.info`` of the kinds of structures that are told apart."""

_UNITS = {keys.ENERGY: "meV/atom", keys.FORCES: "meV/Å", keys.STRESS: "meV/Å³"}
_MOST_SIZES = 8
"""Up to so many different numbers of atoms have a row each; more are put together between powers of two."""


@dataclass
class Group:
    """Holds sums over the errors of a group, leaving out labels that are not there.

    Attributes:
        num_structures: Number of structures; of an element, those that contain it.
        num_atoms: Number of atoms; of an element, its own.
        counts: Number of labels by quantity.
        absolute: Sum of absolute errors in eV (per atom), eV/Å and eV/Å³.
        squares: Sum of squared errors.
    """

    num_structures: int = 0
    num_atoms: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    absolute: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, quantity: str, errors: Floats) -> None:
        """Adds errors of any shape; NaN stands for no label."""
        known = errors[np.isfinite(errors)]
        if known.size:
            self.counts[quantity] = self.counts.get(quantity, 0) + known.size
            self.absolute[quantity] = self.absolute.get(quantity, 0.0) + float(np.abs(known).sum())
            self.squares[quantity] = self.squares.get(quantity, 0.0) + float((known**2).sum())

    def mae(self, quantity: str) -> float:
        """Returns the mean absolute error in eV/atom, eV/Å or eV/Å³; NaN without labels."""
        return self.absolute[quantity] / self.counts[quantity] if quantity in self.counts else math.nan

    def rmse(self, quantity: str) -> float:
        """Returns the root mean square error in eV/atom, eV/Å or eV/Å³; NaN without labels."""
        return math.sqrt(self.squares[quantity] / self.counts[quantity]) if quantity in self.counts else math.nan


class ErrorGroups:
    """Sums the errors of structures as they come.

    Attributes:
        groups: The groups by grouping, one of :data:`GROUPINGS`, and by name.
    """

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, Group]] = {grouping: {} for grouping in GROUPINGS}

    def add(self, record: Record, info: Mapping[str, Any] | None = None) -> None:
        """Adds the errors of a structure.

        Args:
            record: The structure.
            info: Its ``Atoms.info``; ``task`` and ``config_type`` are read.
        """
        kinds = [(name, str((info or {}).get(name, ""))) for name in _KINDS]
        num_atoms = len(record.numbers)
        forces = record.forces - record.given_forces
        for grouping, name in (("all", "all"), *kinds, ("size", str(num_atoms))):
            group = self._group(grouping, name, num_atoms)
            group.add(keys.ENERGY, np.array([record.energy_error]))
            group.add(keys.FORCES, forces)
            group.add(keys.STRESS, record.stress - record.given_stress)
        for number in np.unique(record.numbers):
            own = record.numbers == number
            self._group("element", chemical_symbols[number], int(own.sum())).add(keys.FORCES, forces[own])

    def known(self) -> list[str]:
        """Returns the quantities that have labels."""
        whole = self.groups["all"].get("all", Group())
        return [quantity for quantity in _UNITS if quantity in whole.counts]

    def rows(self, grouping: str) -> list[tuple[str, Group]]:
        """Returns the groups of a grouping in their order; many numbers of atoms are put together to ranges."""
        groups = self.groups[grouping]
        if grouping != "size":
            return [(name or "(none)", groups[name]) for name in sorted(groups)]
        if len(groups) <= _MOST_SIZES:
            return [(name, groups[name]) for name in sorted(groups, key=int)]
        joined: dict[int, Group] = {}
        for name, group in groups.items():
            _merge(joined.setdefault((int(name) - 1).bit_length(), Group()), group)
        return [(f"{2 ** (bits - 1) + 1 if bits else 1}–{2**bits}", joined[bits]) for bits in sorted(joined)]

    def is_told_apart(self, grouping: str) -> bool:
        """Returns whether a grouping says more than all structures together do."""
        names = set(self.groups[grouping])
        return grouping != "all" and (len(names) > 1 or (grouping in _KINDS and names != {""} and bool(names)))

    def tables(self) -> Iterable[Table]:
        """Yields a table for each grouping that tells structures apart, with the errors in meV."""
        for grouping, title in GROUPINGS.items():
            quantities = [keys.FORCES] if grouping == "element" else self.known()
            quantities = [quantity for quantity in quantities if quantity in self.known()]
            if not quantities or not (grouping == "all" or self.is_told_apart(grouping)):
                continue
            table = Table(title=f"Errors: {title[0].lower()}{title[1:]}", caption="MAE / RMSE")
            table.add_column("", no_wrap=True)
            for name in ("structures", "atoms"):
                table.add_column(name, justify="right", no_wrap=True)
            for quantity in quantities:
                table.add_column(f"{quantity}\n({_UNITS[quantity]})", justify="right", no_wrap=True)
            for name, group in self.rows(grouping):
                pairs = [(1000 * group.mae(quantity), 1000 * group.rmse(quantity)) for quantity in quantities]
                cells = [f"{format_error(mae)} / {format_error(rmse)}" for mae, rmse in pairs]
                table.add_row(name, f"{group.num_structures:,}", f"{group.num_atoms:,}", *cells)
            yield table

    def write_csv(self, path: Path) -> None:
        """Writes all groups to a file, with the errors in eV/atom, eV/Å and eV/Å³; nothing where there is no label."""
        header = ["grouping", "group", "structures", "atoms"]
        header += [f"{quantity}_{kind}" for quantity in _UNITS for kind in ("mae", "rmse")]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for grouping in GROUPINGS:
                for name, group in self.rows(grouping):
                    errors = [f(quantity) for quantity in _UNITS for f in (group.mae, group.rmse)]
                    cells = ["" if math.isnan(error) else repr(error) for error in errors]
                    writer.writerow([grouping, name, group.num_structures, group.num_atoms, *cells])

    def _group(self, grouping: str, name: str, num_atoms: int) -> Group:
        group = self.groups[grouping].setdefault(name, Group())
        group.num_structures += 1
        group.num_atoms += num_atoms
        return group


def _merge(group: Group, other: Group) -> None:
    group.num_structures += other.num_structures
    group.num_atoms += other.num_atoms
    sums: Sequence[tuple[dict[str, float], Mapping[str, float]]] = (
        (group.absolute, other.absolute),
        (group.squares, other.squares),
    )
    for total, part in sums:
        for quantity, value in part.items():
            total[quantity] = total.get(quantity, 0.0) + value
    for quantity, count in other.counts.items():
        group.counts[quantity] = group.counts.get(quantity, 0) + count
