"""Holds the facts about many structures in arrays, at about a hundred bytes for each structure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from lightning_januspipe.data.facts import QUANTITIES, Facts
from lightning_januspipe.data.tasks import NAMES

ROW = np.dtype(
    [
        ("file", "<u2"),
        ("index", "<u8"),
        ("num_atoms", "<u4"),
        ("num_edges", "<u8"),
        ("energy", "<f8"),
        ("free_energy_gap", "<f8"),
        ("net_force", "<f8"),
        ("force_square", "<f8"),
        ("num_forces", "<u8"),
        ("own_weight", "<f8"),
        ("digest", "<u8"),
        ("first_element", "<u8"),
        ("num_elements", "<u1"),
        ("kind", "<u4"),
        ("present", "<u1"),
        ("missing", "<u1"),
        ("is_isolated", "?"),
        ("is_lone", "?"),
        ("has_zeroed_forces", "?"),
    ]
)
"""One structure; the fields are those of :class:`~lightning_januspipe.data.facts.Facts`."""

ELEMENT = np.dtype([("number", "<u1"), ("count", "<u4")])
"""One element of one structure, with the number of its atoms."""


class StructureKind(NamedTuple):
    """Holds what many structures have in common.

    Attributes:
        is_periodic: Whether any direction is periodic.
        config_type: ``config_type`` in ``Atoms.info``; None where there is none.
        electrons: Charge and spin in ``Atoms.info``, as text.
        conditions: ``task``, ``charge`` and ``spin`` in ``Atoms.info``, in this order; None for what is not there.
        available: Names of everything that a structure holds beside its geometry.
    """

    is_periodic: bool
    config_type: str | None
    electrons: str
    conditions: tuple[Any, ...]
    available: tuple[str, ...]

    def info(self) -> dict[str, Any]:
        """Returns what the structures have of ``task``, ``charge`` and ``spin``."""
        return {name: value for name, value in zip(NAMES, self.conditions, strict=True) if value is not None}


@dataclass(frozen=True)
class FactsTable:
    """Holds facts about n structures.

    Attributes:
        rows: (n,) of type ``ROW``. Field ``kind`` is an index into ``kinds``; ``first_element`` and ``num_elements``
            say which ``elements`` are those of the structure; ``present`` and ``missing`` have a bit for each of
            ``QUANTITIES``; ``file`` is an index into ``files``, and ``index`` one into the structures of that file.
        elements: Elements of all structures, of type ``ELEMENT``.
        kinds: Kinds of structures.
        files: Files of the structures in messages, "" where there is none.
    """

    rows: NDArray[np.void]
    elements: NDArray[np.void]
    kinds: Sequence[StructureKind]
    files: Sequence[str] = ("",)

    @classmethod
    def of(cls, facts: Iterable[Facts], source: str = "") -> FactsTable:
        """Returns the table of facts about single structures."""
        rows: list[tuple[Any, ...]] = []
        elements: list[tuple[int, int]] = []
        kinds: dict[StructureKind, int] = {}
        for one in facts:
            kind = StructureKind(one.is_periodic, one.config_type, one.electrons, one.conditions, one.available)
            rows.append(
                (
                    0,
                    one.index,
                    one.num_atoms,
                    one.num_edges,
                    one.energy,
                    one.free_energy_gap,
                    one.net_force,
                    one.force_square,
                    one.num_forces,
                    one.own_weight,
                    one.digest,
                    len(elements),
                    len(one.composition),
                    kinds.setdefault(kind, len(kinds)),
                    _bits(one.present),
                    _bits(one.missing),
                    one.is_isolated,
                    one.num_atoms == 1 and one.num_edges == 0,
                    one.has_zeroed_forces,
                )
            )
            elements += one.composition
        return cls(np.array(rows, dtype=ROW), np.array(elements, dtype=ELEMENT), list(kinds), [source])

    @classmethod
    def joined(cls, tables: Sequence[FactsTable]) -> FactsTable:
        """Returns one table of the structures of several tables."""
        kinds: dict[StructureKind, int] = {}
        files: dict[str, int] = {}
        parts, start = [], 0
        for table in tables:
            rows = table.rows.copy()
            rows["kind"] = np.array([kinds.setdefault(k, len(kinds)) for k in table.kinds], dtype="<u4")[rows["kind"]]
            rows["file"] = np.array([files.setdefault(f, len(files)) for f in table.files], dtype="<u2")[rows["file"]]
            rows["first_element"] += start
            start += len(table.elements)
            parts.append(rows)
        return cls(np.concatenate(parts), np.concatenate([t.elements for t in tables]), list(kinds), list(files))

    def __len__(self) -> int:
        """Returns the number of structures."""
        return len(self.rows)

    def take(self, chosen: Any) -> FactsTable:
        """Returns the table of some structures.

        Args:
            chosen: Positions in this table, or a mask.
        """
        return replace(self, rows=self.rows[chosen])

    def has(self, quantity: str, column: str = "present") -> NDArray[np.bool_]:
        """Returns whether each structure has a label, (n,)."""
        return (self.rows[column] & _bits([quantity])).astype(bool)

    def name(self, position: int) -> str:
        """Returns the name of a structure in messages."""
        return frame_name(self.files[self.rows["file"][position]], int(self.rows["index"][position]))

    def composition(self, position: int) -> dict[int, int]:
        """Returns the numbers of atoms of a structure by atomic number."""
        row = self.rows[position]
        first = int(row["first_element"])
        own = self.elements[first : first + int(row["num_elements"])]
        return dict(zip(own["number"].tolist(), own["count"].tolist(), strict=True))

    def of_task(self, name: str | None, alone: bool = False) -> NDArray[np.bool_]:
        """Returns whether each structure has a task, (n,).

        Args:
            name: Name of the task; None for structures without one.
            alone: Whether it is the only one, so that structures without a task have it too.
        """
        names = [kind.info().get("task") for kind in self.kinds]
        return np.array([own == name or (alone and own is None) for own in names], dtype=bool)[self.rows["kind"]]

    def all_elements(self) -> set[int]:
        """Returns the atomic numbers that occur."""
        return set(np.unique(self.elements["number"][self._entries()[1]]).tolist())

    def first_with(self, number: int) -> int:
        """Returns the position of the first structure with an element."""
        owner, entries = self._entries()
        return int(owner[self.elements["number"][entries] == number][0])

    def counts(self, columns: Mapping[int, int]) -> NDArray[np.int64]:
        """Returns the numbers of atoms of each element in each structure.

        Args:
            columns: Column by atomic number; 0 to n - 1 for n elements.
        """
        owner, entries = self._entries()
        column = np.full(256, -1)
        column[list(columns)] = list(columns.values())
        counts = np.zeros((len(self), len(columns)), dtype=np.int64)
        np.add.at(counts, (owner, column[self.elements["number"][entries]]), self.elements["count"][entries])
        return counts

    def _entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns, for each element of each structure, the position of the structure, and of the entry."""
        num, first = self.rows["num_elements"].astype(np.int64), self.rows["first_element"].astype(np.int64)
        owner = np.repeat(np.arange(len(self)), num)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(num) - num, num)
        return owner, np.repeat(first, num) + within


def frame_name(source: str, index: int) -> str:
    """Returns the name of a structure in messages: its file and frame."""
    return f"{source}, frame {index}" if source else f"structure {index}"


def facts_of(dataset: Any) -> FactsTable | None:
    """Returns facts about the structures of a dataset; None where they cannot be known.

    Args:
        dataset: A dataset with a method ``facts``, or a ``Subset`` or ``ConcatDataset`` of such.

    Raises:
        ValueError: A structure or its labels are not usable.
    """
    if isinstance(dataset, ConcatDataset):
        tables = [facts_of(part) for part in dataset.datasets]
        known = [table for table in tables if table is not None]
        return FactsTable.joined(known) if len(known) == len(tables) else None
    indices: NDArray[np.int64] | None = None
    while isinstance(dataset, Subset):
        own = np.asarray(dataset.indices, dtype=np.int64)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    found = dataset.facts(indices) if callable(getattr(dataset, "facts", None)) else None
    return found if isinstance(found, FactsTable) else None


def _bits(quantities: Iterable[str]) -> int:
    return sum(1 << QUANTITIES.index(quantity) for quantity in quantities)
