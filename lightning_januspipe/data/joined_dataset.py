"""Defines a dataset of the structures in several files, and finds the files that a user names."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor
from typing_extensions import override

from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.disk_dataset import open_dataset
from lightning_januspipe.data.facts_table import FactsTable

Files = list[str | Path] | str | Path
"""A file, a pattern of files such as ``folder/*.extxyz``, or a list of these."""


class JoinedDataset(StructureDataset):
    """Has the structures of several datasets, one dataset after the other.

    Args:
        parts: Datasets with the same options; those without samples so far get the same species.
        species: Chemical symbols in the model's order; None for all that occur, sorted by atomic number.
    """

    def __init__(self, parts: Sequence[StructureDataset], species: Sequence[str] | None = None) -> None:
        self._parts = list(parts)
        self.tasks, self.labels, self.cutoff, self.dtype = (
            getattr(parts[0], name) for name in ("tasks", "labels", "cutoff", "dtype")
        )
        found = {symbol for part in parts for symbol in part.species}
        self.species = sorted(found, key=atomic_numbers.__getitem__) if species is None else list(species)
        for part in parts:
            part.use_species(self.species)
        self._starts = np.cumsum([0, *map(len, parts)])

    @override
    def __len__(self) -> int:
        """Returns the number of structures."""
        return int(self._starts[-1])

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample; see :class:`StructureDataset`."""
        part, own = self._place(index)
        return part[own]

    @override
    def sample_sizes(self) -> tuple[Any, Any]:
        """Returns the numbers of atoms and of edges of all structures, as arrays."""
        atoms, edges = zip(*(part.sample_sizes() for part in self._parts), strict=True)
        return np.concatenate(atoms), np.concatenate(edges)

    @override
    def facts(self, indices: Sequence[int] | None = None) -> FactsTable:
        """Returns facts about structures; see :class:`StructureDataset`."""
        if indices is None:
            return FactsTable.joined([part.facts() for part in self._parts])
        chosen = np.asarray(indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, chosen, side="right") - 1
        tables = [part.facts(chosen[owners == k] - self._starts[k]) for k, part in enumerate(self._parts)]
        return FactsTable.joined(tables).take(np.argsort(np.argsort(owners, kind="stable")))

    @override
    def isolated_atoms(self) -> list[int]:
        """Returns the indices of isolated atoms."""
        starts = self._starts.tolist()
        return [start + own for start, part in zip(starts, self._parts, strict=False) for own in part.isolated_atoms()]

    @override
    def kinds(self) -> list[tuple[frozenset[int], bool, str]]:
        """Returns the elements, the periodicity and the ``config_type`` of each structure."""
        return [kind for part in self._parts for kind in part.kinds()]

    @property
    @override
    def files(self) -> list[Path]:
        """Returns the files that the structures were read from."""
        return [file for part in self._parts for file in part.files]

    @override
    def describe(self, index: int) -> str:
        """Returns the name of a structure in messages: its file and frame."""
        part, own = self._place(index)
        return part.describe(own)

    @override
    def atoms(self, index: int) -> Atoms:
        """Returns a structure as it was read."""
        part, own = self._place(index)
        return part.atoms(own)

    def _place(self, index: int) -> tuple[StructureDataset, int]:
        """Returns the dataset that has a structure, and its index there."""
        index = self._position(index)
        owner = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[owner], index - int(self._starts[owner])


def open_datasets(
    files: Sequence[str], *, species: Sequence[str] | None, precompute: bool, **options: Any
) -> StructureDataset:
    """Returns a dataset of the structures in one or several files, in their order.

    Args:
        files: The files; at least one.
        species: Chemical symbols in the model's order; None for all that occur, sorted by atomic number.
        precompute: See :class:`StructureDataset`.
        options: Further options of :func:`~lightning_januspipe.data.disk_dataset.open_dataset`.
    """
    options["species"] = "auto" if species is None else species
    if len(files) == 1:
        return open_dataset(files[0], precompute=precompute, **options)
    joined = JoinedDataset([open_dataset(file, **options) for file in files], species)
    if precompute:
        joined.facts()
    return joined


def check_files(name: str, given: Any) -> list[str]:
    """Returns what a user gives as files, as a list of paths and patterns.

    Args:
        name: Name of the option in errors.
        given: A path, a pattern, or a list of these.

    Raises:
        ValueError: There is none, or something is no path.
    """
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    if not found or not all(isinstance(one, (str, os.PathLike)) and os.fspath(one) for one in found):
        raise ValueError(f"{name}={given!r}; expected a file, a pattern such as 'folder/*.extxyz', or a list of these")
    return [os.fspath(one) for one in found]


def find_files(name: str, given: Sequence[str]) -> list[str]:
    """Returns the files that paths and patterns stand for; those of a pattern in alphabetical order.

    Args:
        name: Name of the option in errors.
        given: Paths, which need not be there, and patterns.

    Raises:
        ValueError: No file matches a pattern, or a file is there twice.
    """
    found = [*chain.from_iterable(_matching(name, one) for one in given)]
    if twice := [file for file, num in Counter(map(os.path.realpath, found)).items() if num > 1]:
        raise ValueError(f"{name} names {twice[0]} twice; expected each file once")
    return found


def _matching(name: str, given: str) -> list[str]:
    if os.path.exists(given) or not glob.has_magic(given):
        return [given]
    found = sorted(glob.glob(os.path.expanduser(given), recursive=True))
    if not found:
        raise ValueError(f"{name}: no file matches {given} (looked in {Path.cwd()}); check the pattern")
    return found
