"""Defines a map-style dataset that reads atomic structures and makes their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_januspipe import keys
from lightning_januspipe.data.facts import Facts, is_isolated_atom
from lightning_januspipe.data.facts_table import FactsTable, frame_name
from lightning_januspipe.data.labels import LabelKeys
from lightning_januspipe.data.neighbors import estimate_num_edges
from lightning_januspipe.data.sample_cache import SampleRecipe
from lightning_januspipe.data.structures import (
    check_database_units,
    find_species,
    read_structures,
    resolve_dtype,
    species_index,
    validate_species,
)
from lightning_januspipe.data.suspicions import LabelCounts
from lightning_januspipe.data.tasks import read_task, validate_tasks


class StructureDataset(Dataset[dict[str, Tensor]]):
    """Holds structures with energy, forces and, where known, stress.

    Each item is a *sample*: a batch of one structure with the keys of ``lightning_januspipe.keys``, including its
    neighbour list. Samples are made on first use and kept. Two calls for one item share its tensors, so do not change
    them in place; a collated batch has its own.

    Attributes:
        species: Chemical symbols; a sample's ``species`` are indices into this list.
        cutoff: Cutoff of the neighbour lists in Å.
        dtype: Type of the floating-point tensors, but for energies, which are float64.
        labels: Names and units of the labels.
    """

    def __init__(
        self,
        structures: Sequence[Atoms] | str | Path,
        *,
        cutoff: float,
        species: Sequence[str] | Literal["auto"] = "auto",
        dtype: torch.dtype | str | None = None,
        require_labels: bool = True,
        precompute: bool = False,
        config_type_weights: Mapping[str, float] | None = None,
        weight_key: str | None = None,
        tasks: Sequence[str] | None = None,
        task: str | None = None,
        **labels: Any,
    ) -> None:
        """Reads the structures.

        Args:
            structures: ASE ``Atoms``, or a file: extended XYZ, an ASE database (``.db``), or another format of
                ``ase.io``.
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for all that occur, sorted by atomic number.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` at this moment.
            require_labels: Whether each structure must have energy and forces; otherwise missing ones become NaN.
            precompute: Make, and so check, all samples now instead of on first use. Otherwise each worker process of
                a loader makes its own.
            config_type_weights: Factors of the structures' losses by ``config_type`` in ``Atoms.info``, which is
                ``"Default"`` where a structure has none; 1 for other types. None for no weights.
            weight_key: Name in ``Atoms.info`` of a further factor, 1 where a structure has none. None for no weights.
            tasks: Names of tasks in the order of the task index: samples then have ``task``, ``charge`` and ``spin``,
                read from ``Atoms.info`` (see :func:`~lightning_januspipe.data.tasks.read_task`). None for no tasks.
            task: Name of the task that all structures get, whatever ``Atoms.info`` says; None for their own.
            labels: Names and units of the labels, as the attributes of
                :class:`~lightning_januspipe.data.labels.LabelKeys`.

        Raises:
            ValueError: The file is missing, empty or unreadable, there are no structures, or ``species`` or ``dtype``
                is not valid. Errors of single structures (see :func:`atoms_to_sample`) are raised with their sample.
        """
        self._prepare(cutoff, dtype, require_labels, config_type_weights, weight_key, tasks, task, labels)
        if isinstance(structures, (str, Path)):
            self._source = str(structures)
            self._structures: Sequence[Atoms] = read_structures(structures)
            if Path(structures).suffix == ".db":
                check_database_units(structures, self.labels)
        else:
            self._source = ""
            self._structures = list(structures)
        if not self._structures:
            raise ValueError("the dataset is empty; expected at least one structure")
        self.species = find_species(self._structures) if species == "auto" else validate_species(species)
        self._samples: dict[int, dict[str, Tensor]] = {}
        self._facts: dict[int, Facts] = {}
        self._counted: set[int] = set()
        self._table: FactsTable | None = None
        if precompute:
            self.facts()

    def _prepare(
        self,
        cutoff: float,
        dtype: torch.dtype | str | None,
        require_labels: bool,
        config_type_weights: Mapping[str, float] | None,
        weight_key: str | None,
        tasks: Sequence[str] | None,
        task: str | None,
        labels: Mapping[str, Any],
    ) -> None:
        """Keeps and checks the arguments of the constructor that do not depend on the structures."""
        self.tasks = validate_tasks(tasks)
        if task is not None and task not in self.tasks:
            raise ValueError(f"task={task!r}; expected one of the tasks {self.tasks}")
        self._asked = {} if task is None else {keys.TASK: task}
        self.labels = LabelKeys(**labels)
        self._weights = None if config_type_weights is None else dict(config_type_weights)
        if bad := {name: weight for name, weight in (self._weights or {}).items() if not 0 <= weight < float("inf")}:
            raise ValueError(f"config_type_weights has {bad}; expected finite numbers, at least 0")
        if not cutoff > 0:
            raise ValueError(f"cutoff={cutoff!r} Å; expected a positive number")
        self.cutoff = float(cutoff)
        self.dtype = resolve_dtype(dtype)
        self._recipe = SampleRecipe(self.cutoff, self.labels, require_labels, weight_key)

    def __len__(self) -> int:
        """Returns the number of structures."""
        return len(self._structures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample.

        Args:
            index: Index of the structure; negative indices count from the end.

        Raises:
            IndexError: There is no such structure.
            ValueError: The structure or its labels are not usable (see :func:`atoms_to_sample`).
        """
        index = self._position(index)
        if index not in self._samples:
            self._make(index)
        return dict(self._samples[index])

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"structure {index} of a dataset of {len(self)}")
        return int(index) % len(self)

    def _make(self, index: int) -> None:
        """Makes the sample of a structure, and finds the facts about it."""
        atoms = self._structures[index]
        chosen = species_index(atoms, self.species, self.describe(index))
        arrays, facts = self._recipe.arrays(atoms, index, self._source)
        self._samples[index] = arrays.sample(chosen, self.dtype) | self._weight(facts.config_type, facts.own_weight)
        if self.tasks:
            self._samples[index] |= read_task(atoms.info | self._asked, self.tasks, self.describe(index))
        self._facts[index] = facts

    def _weight(self, config_type: str | None, own: float) -> dict[str, Tensor]:
        """Returns the factor of a structure's loss, as far as there are any."""
        if self._weights is None and self._recipe.weight_key is None:
            return {}
        factor = float((self._weights or {}).get("Default" if config_type is None else config_type, 1.0))
        return {keys.WEIGHT: torch.tensor([factor * own], dtype=self.dtype)}

    def sample_sizes(self) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the numbers of atoms and of edges of all structures, the same in every process.

        Edges are counted in structures whose :meth:`facts` were asked for, as all are with ``precompute``. They are
        estimated in others, also where this process has read the sample.
        """
        edges = []
        for index, atoms in enumerate(self._structures):
            if index in self._counted:
                edges.append(self._facts[index].num_edges)
            else:
                edges.append(round(estimate_num_edges(atoms.positions, atoms.cell.array, atoms.pbc, self.cutoff)))
        return [len(atoms) for atoms in self._structures], edges

    def facts(self, indices: Sequence[int] | None = None) -> FactsTable:
        """Returns facts about structures; the first call makes, and so checks, their samples.

        Args:
            indices: Indices of the structures; None for all.

        Raises:
            ValueError: A structure or its labels are not usable (see :func:`atoms_to_sample`).
        """
        chosen = range(len(self)) if indices is None else indices
        for index in chosen:
            if index not in self._facts:
                self._make(index)
        self._counted.update(chosen)
        if self._table is None and len(self._facts) < len(self):
            return FactsTable.of((self._facts[index] for index in chosen), self._source)
        if self._table is None:
            self._table = FactsTable.of((self._facts[index] for index in range(len(self))), self._source)
        return self._table if indices is None else self._table.take(np.asarray(indices, dtype=np.int64))

    def count_labels(self, indices: Sequence[int] | None = None) -> LabelCounts:
        """Counts the labels of structures; see :meth:`facts`."""
        return LabelCounts.of(self.facts(indices), self.labels)

    def isolated_atoms(self) -> list[int]:
        """Returns the indices of isolated atoms."""
        return [index for index, atoms in enumerate(self._structures) if is_isolated_atom(atoms)]

    def kinds(self) -> list[tuple[frozenset[int], bool, str]]:
        """Returns the elements, the periodicity and the ``config_type`` of each structure."""
        return [
            (frozenset(atoms.numbers.tolist()), bool(atoms.pbc.any()), str(atoms.info.get("config_type", "")))
            for atoms in self._structures
        ]

    def use_species(self, species: Sequence[str]) -> None:
        """Sets the species of a dataset that has made no samples yet.

        Args:
            species: Chemical symbols in the model's order.
        """
        assert not self._samples, "samples have indices of the species before"
        self.species = list(species)

    @property
    def files(self) -> list[Path]:
        """Returns the files that the structures were read from; none if they were given as ``Atoms``."""
        return [Path(self._source)] if self._source else []

    def describe(self, index: int) -> str:
        """Returns the name of a structure in messages: its file and frame."""
        return frame_name(self._source, index)

    def atoms(self, index: int) -> Atoms:
        """Returns a structure as it was read."""
        return self._structures[index]


class IndexedDataset(Subset[dict[str, Tensor]]):
    """Adds ``sample_index`` to the samples of a dataset, so that results can be brought back into its order.

    Args:
        dataset: A map-style dataset of samples.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, range(len(dataset)))

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """Returns one sample with its index."""
        return self.dataset[index] | {keys.SAMPLE_INDEX: torch.tensor([int(index)])}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Returns the samples of a batch, which torch asks for in one call."""
        return [self[index] for index in indices]
