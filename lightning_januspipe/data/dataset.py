"""Defines a map-style dataset that reads atomic structures and makes their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ase import Atoms
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_januspipe import keys
from lightning_januspipe.data.facts import Facts, LabelCounts
from lightning_januspipe.data.labels import LabelKeys
from lightning_januspipe.data.neighbors import estimate_num_edges
from lightning_januspipe.data.structures import (
    atoms_to_sample,
    check_database_units,
    find_species,
    read_structures,
    resolve_dtype,
    validate_species,
)


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
            labels: Names and units of the labels, as the attributes of
                :class:`~lightning_januspipe.data.labels.LabelKeys`.

        Raises:
            ValueError: The file is missing, empty or unreadable, there are no structures, or ``species`` or ``dtype``
                is not valid. Errors of single structures (see :func:`atoms_to_sample`) are raised with their sample.
        """
        self.labels = LabelKeys(**labels)
        self._weights = None if config_type_weights is None else dict(config_type_weights)
        self._weight_key = weight_key
        if isinstance(structures, (str, Path)):
            self._source = str(structures)
            self._structures = read_structures(structures)
            if Path(structures).suffix == ".db":
                check_database_units(structures, self.labels)
        else:
            self._source = ""
            self._structures = list(structures)
        if bad := {name: weight for name, weight in (self._weights or {}).items() if not 0 <= weight < float("inf")}:
            raise ValueError(f"config_type_weights has {bad}; expected finite numbers, at least 0")
        if not self._structures:
            raise ValueError("the dataset is empty; expected at least one structure")
        if not cutoff > 0:
            raise ValueError(f"cutoff={cutoff!r} Å; expected a positive number")
        self.species = find_species(self._structures) if species == "auto" else validate_species(species)
        self.cutoff = float(cutoff)
        self.dtype = resolve_dtype(dtype)
        self._require_labels = require_labels
        self._samples: dict[int, dict[str, Tensor]] = {}
        self._facts: dict[int, Facts] = {}
        self._edges: dict[int, int] = {}
        if precompute:
            self.facts()

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
        if not -len(self) <= index < len(self):
            raise IndexError(f"structure {index} of a dataset of {len(self)}")
        index = int(index) % len(self)
        if index not in self._samples:
            self._samples[index] = atoms_to_sample(
                self._structures[index],
                species=self.species,
                cutoff=self.cutoff,
                dtype=self.dtype,
                labels=self.labels,
                require_labels=self._require_labels,
                source=self.describe(index),
            )
            if self._weights is not None or self._weight_key is not None:
                self._samples[index][keys.WEIGHT] = torch.tensor([self._weight(index)], dtype=self.dtype)
        return dict(self._samples[index])

    def _weight(self, index: int) -> float:
        """Returns the factor of a structure's loss."""
        info, weights = self._structures[index].info, self._weights or {}
        own = info.get(self._weight_key, 1.0) if self._weight_key is not None else 1.0
        try:
            weight = float(weights.get(str(info.get("config_type", "Default")), 1.0)) * float(own)
        except (TypeError, ValueError):
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"{self.describe(index)} has the weight {own!r} under {self._weight_key!r}; expected a number of at "
                "least 0"
            )
        return weight

    def sample_sizes(self) -> tuple[list[int], list[int]]:
        """Returns the numbers of atoms and of edges of all structures, the same in every process.

        Edges are counted in structures whose :meth:`facts` are known, as all are with ``precompute``, and estimated in
        others.
        """
        for index, atoms in enumerate(self._structures):
            if index not in self._edges:
                estimate = estimate_num_edges(atoms.positions, atoms.cell.array, atoms.pbc, self.cutoff)
                self._edges[index] = round(estimate)
        return [len(atoms) for atoms in self._structures], [self._edges[index] for index in range(len(self))]

    def facts(self, indices: Sequence[int] | None = None) -> list[Facts]:
        """Returns facts about structures; the first call makes, and so checks, their samples.

        Args:
            indices: Indices of the structures; None for all.

        Raises:
            ValueError: A structure or its labels are not usable (see :func:`atoms_to_sample`).
        """
        found = []
        for index in range(len(self)) if indices is None else indices:
            if index not in self._facts:
                name, atoms = self.describe(index), self._structures[index]
                self._facts[index] = Facts.of(atoms, self[index], name, self.labels)
                self._edges[index] = self._facts[index].num_edges
            found.append(self._facts[index])
        return found

    def count_labels(self, indices: Sequence[int] | None = None) -> LabelCounts:
        """Counts the labels of structures; see :meth:`facts`."""
        return LabelCounts.of(self.facts(indices), self.labels)

    def describe(self, index: int) -> str:
        """Returns the name of a structure in messages: its file and frame."""
        return f"{self._source}, frame {index}" if self._source else f"structure {index}"

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
