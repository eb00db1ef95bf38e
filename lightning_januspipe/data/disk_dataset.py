"""Defines a dataset that reads each sample from the disk, for files that do not fit into the memory of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor
from typing_extensions import override

from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.facts_table import FactsTable
from lightning_januspipe.data.frames import FORMATS, open_frames
from lightning_januspipe.data.sample_cache import CHUNK_SIZE, SampleCache, default_root
from lightning_januspipe.data.structures import check_database_units, require_file, require_known, validate_species
from lightning_januspipe.data.tasks import read_task

LARGE = 200_000_000
"""Files of so many bytes are read lazily, unless ``lazy`` says otherwise."""


class DiskDataset(StructureDataset):
    """Has the samples of a :class:`StructureDataset`, and reads each of them from the disk when it is asked for.

    The processes that first open a file read all of it once, each a part, and keep neighbour lists, labels and facts
    in a cache: a folder that belongs to the content of the file, the cutoff and the names of the labels. Later
    processes and jobs read only what they use. Records are verified by checksums, and what is damaged is made anew.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        cutoff: float,
        species: Sequence[str] | Literal["auto"] = "auto",
        dtype: torch.dtype | str | None = None,
        require_labels: bool = True,
        config_type_weights: Mapping[str, float] | None = None,
        weight_key: str | None = None,
        tasks: Sequence[str] | None = None,
        task: str | None = None,
        cache_dir: str | Path | None = None,
        chunk_size: int = CHUNK_SIZE,
        **labels: Any,
    ) -> None:
        """Opens the file, and makes its cache if there is none.

        Args:
            file: Extended XYZ, an ASE database (``.db``), ASE's rows in LMDB (``.aselmdb``, ``.lmdb``), or a
                trajectory of ASE (``.traj``).
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for all that occur, sorted by atomic number.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` at this moment.
            require_labels: Whether each structure must have energy and forces; otherwise missing ones become NaN.
            config_type_weights: See :class:`StructureDataset`.
            weight_key: See :class:`StructureDataset`.
            tasks: See :class:`StructureDataset`.
            task: See :class:`StructureDataset`.
            cache_dir: Folder of all caches; None for ``~/.cache/lightning_januspipe/structures``.
            chunk_size: Structures that one process makes at a time.
            labels: Names and units of the labels, as the attributes of
                :class:`~lightning_januspipe.data.labels.LabelKeys`.

        Raises:
            ValueError: The file is missing or unreadable, its format cannot be read structure by structure, or a
                structure or its labels are not usable.
            CheckpointError: The cache cannot be written.
        """
        self._prepare(cutoff, dtype, require_labels, config_type_weights, weight_key, tasks, task, labels)
        path, root = require_file(file), default_root() if cache_dir is None else Path(cache_dir).expanduser()
        self._source = str(file)
        self._structures = open_frames(path, root)
        if path.suffix == ".db":
            check_database_units(path, self.labels)
        self._cache = SampleCache(self._structures, self._recipe, root, chunk_size)
        found = [chemical_symbols[number] for number in sorted(self._cache.table.all_elements()) if number]
        self.use_species(found if species == "auto" else validate_species(species))

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample, whose tensors are new; see :class:`StructureDataset`."""
        index = self._position(index)
        arrays, table = self._cache.arrays(index), self._cache.table
        chosen = self._species_of[arrays.numbers]
        if (chosen < 0).any():
            self._require_known(table.take([index]))
        kind = table.kinds[table.rows["kind"][index]]
        own = float(table.rows["own_weight"][index])
        sample = arrays.sample(chosen, self.dtype) | self._weight(kind.config_type, own)
        if self.tasks:
            sample |= read_task(kind.info() | self._asked, self.tasks, self.describe(index))
        return sample

    @override
    def use_species(self, species: Sequence[str]) -> None:
        """Sets the species; see :class:`StructureDataset`."""
        self.species = list(species)
        self._species_of = np.full(256, -1)
        self._species_of[[chemical_symbols.index(symbol) for symbol in self.species]] = range(len(self.species))

    @override
    def sample_sizes(self) -> tuple[Any, Any]:
        """Returns the numbers of atoms and of edges of all structures, as arrays."""
        return self._cache.table.rows["num_atoms"], self._cache.table.rows["num_edges"]

    @override
    def facts(self, indices: Sequence[int] | None = None) -> FactsTable:
        """Returns facts about structures, which are in the cache.

        Raises:
            ValueError: A structure has an element that is not among the species, or an unknown task.
        """
        table = self._cache.table
        found = table if indices is None else table.take(np.asarray(indices, dtype=np.int64))
        self._require_known(found)
        for kind, first in zip(*np.unique(found.rows["kind"], return_index=True), strict=True) if self.tasks else ():
            read_task(found.kinds[kind].info() | self._asked, self.tasks, found.name(int(first)))
        return found

    @override
    def isolated_atoms(self) -> list[int]:
        """Returns the indices of isolated atoms."""
        return np.flatnonzero(self._cache.table.rows["is_isolated"]).tolist()

    @override
    def kinds(self) -> list[tuple[frozenset[int], bool, str]]:
        """Returns the elements, the periodicity and the ``config_type`` of each structure."""
        table, found = self._cache.table, []
        for position in range(len(table)):
            kind = table.kinds[table.rows["kind"][position]]
            found.append((frozenset(table.composition(position)), kind.is_periodic, kind.config_type or ""))
        return found

    @override
    def atoms(self, index: int) -> Atoms:
        """Reads a structure from the file."""
        return self._structures[index]

    def _require_known(self, facts: FactsTable) -> None:
        """Refuses structures with elements that are not among the species."""
        symbols = {chemical_symbols[number]: number for number in facts.all_elements()}
        unknown = [number for symbol, number in symbols.items() if symbol not in self.species]
        if unknown:
            first = min(facts.first_with(number) for number in unknown)
            own = [chemical_symbols[number] for number in facts.composition(first)]
            require_known(own, self.species, facts.name(first))


def open_dataset(
    file: str | Path,
    *,
    lazy: bool | Literal["auto"] = "auto",
    cache_dir: str | Path | None = None,
    precompute: bool = False,
    **options: Any,
) -> StructureDataset:
    """Returns a dataset of the structures in a file, which are read from the disk or held in memory.

    Args:
        file: The file.
        lazy: True for a :class:`DiskDataset`, False for a :class:`StructureDataset` in memory; ``"auto"`` for a
            ``DiskDataset`` if the format allows it and the file is larger than 200 MB.
        cache_dir: See :class:`DiskDataset`.
        precompute: See :class:`StructureDataset`.
        options: Further options that both have.
    """
    path = Path(file)
    if lazy == "auto":
        content = path / "data.mdb" if path.is_dir() else path
        lazy = path.suffix in FORMATS and content.is_file() and content.stat().st_size >= LARGE
    if lazy:
        return DiskDataset(file, cache_dir=cache_dir, **options)
    return StructureDataset(file, precompute=precompute, **options)
