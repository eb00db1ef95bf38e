"""A map-style dataset that reads atomic structures and makes their samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from ase import Atoms
from torch import Tensor
from torch.utils.data import Dataset

from lightning_januspipe import keys
from lightning_januspipe.data.neighbors import estimate_num_edges
from lightning_januspipe.data.structures import (
    atoms_to_sample,
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
        dtype: Type of the floating-point tensors.
    """

    def __init__(
        self,
        structures: Sequence[Atoms] | str | Path,
        *,
        cutoff: float,
        species: Sequence[str] | Literal["auto"] = "auto",
        energy_key: str = "energy",
        forces_key: str = "forces",
        stress_key: str | None = "stress",
        dtype: torch.dtype | str | None = None,
        require_labels: bool = True,
        precompute: bool = False,
    ) -> None:
        """Read the structures.

        Args:
            structures: ASE ``Atoms``, or a file: extended XYZ, an ASE database (``.db``), or another format of
                ``ase.io``.
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for all that occur, sorted by atomic number.
            energy_key: Name of the energy label (eV).
            forces_key: Name of the forces label (eV/Å).
            stress_key: Name of the stress label (eV/Å³); None to read no stress.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` at this moment.
            require_labels: Whether each structure must have energy and forces; False for prediction.
            precompute: Make, and so check, all samples now instead of on first use. Otherwise each worker process of
                a loader makes its own.

        Raises:
            ValueError: The file is missing, empty or unreadable, there are no structures, or ``species`` or ``dtype``
                is not valid. Errors of single structures (see :func:`atoms_to_sample`) are raised with their sample.
        """
        if isinstance(structures, (str, Path)):
            self._source = str(structures)
            self._structures = read_structures(structures)
        else:
            self._source = ""
            self._structures = list(structures)
        if not self._structures:
            raise ValueError("the dataset is empty; expected at least one structure")
        if not cutoff > 0:
            raise ValueError(f"cutoff={cutoff!r} Å; expected a positive number")
        self.species = find_species(self._structures) if species == "auto" else validate_species(species)
        self.cutoff = float(cutoff)
        self.dtype = resolve_dtype(dtype)
        self._energy_key = energy_key
        self._forces_key = forces_key
        self._stress_key = stress_key
        self._require_labels = require_labels
        self._samples: dict[int, dict[str, Tensor]] = {}
        self._precomputed = precompute
        self._sizes: tuple[list[int], list[int]] | None = None
        if precompute:
            for index in range(len(self)):
                self[index]

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self._structures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample.

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
                energy_key=self._energy_key,
                forces_key=self._forces_key,
                stress_key=self._stress_key,
                require_labels=self._require_labels,
                source=self.describe(index),
            )
        return dict(self._samples[index])

    def sample_sizes(self) -> tuple[list[int], list[int]]:
        """Return the numbers of atoms and of edges of all structures, the same in every process.

        Edges are counted if all samples were made at once (``precompute``), otherwise estimated.
        """
        if self._sizes is None:
            edges = []
            for index, atoms in enumerate(self._structures):
                if self._precomputed:
                    edges.append(self._samples[index][keys.EDGE_INDEX].shape[1])
                else:
                    estimate = estimate_num_edges(atoms.positions, atoms.cell.array, atoms.pbc, self.cutoff)
                    edges.append(round(estimate))
            self._sizes = [len(atoms) for atoms in self._structures], edges
        return self._sizes

    def describe(self, index: int) -> str:
        """Return the name of a structure in messages: its file and frame."""
        return f"{self._source}, frame {index}" if self._source else f"structure {index}"

    def atoms(self, index: int) -> Atoms:
        """Return a structure as it was read."""
        return self._structures[index]
