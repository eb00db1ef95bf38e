"""Computes the statistics of a dataset that a model starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys


class SampleDataset(Protocol):
    """Is any map-style dataset of samples."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """Returns one sample."""


@dataclass(frozen=True)
class DatasetStatistics:
    """Holds what a model needs to start near the scale of its data.

    Attributes:
        energy_shifts: Energy of each species in eV (one value per species index): the known reference energies, and
            a fit of the others by least squares over the total energies. Where compositions do not determine them, the
            smallest shifts that fit; 0 for absent species.
        energy_rms: Root mean square over structures of the energy per atom minus the shifts, in eV.
        force_rms: Root mean square of all force components in eV/Å; 0 if all forces are, as for single atoms.
        avg_num_neighbors: Edges per atom; 0 for isolated atoms.
        num_structures: Number of structures B.
        num_atoms: Number of atoms N of all structures together.
        num_edges: Number of edges E of all structures together.
    """

    energy_shifts: tuple[float, ...]
    energy_rms: float
    force_rms: float
    avg_num_neighbors: float
    num_structures: int
    num_atoms: int
    num_edges: int


def dataset_statistics(
    dataset: SampleDataset,
    num_species: int | None = None,
    reference_energies: Sequence[float | None] | None = None,
) -> DatasetStatistics:
    """Computes statistics over all samples of a dataset, in float64.

    Lone atoms without neighbours do not count, unless there is nothing else. Labels that are NaN are left out.

    Args:
        dataset: Map-style dataset of samples, for instance a ``StructureDataset`` or a ``Subset`` of one.
        num_species: Length of the species list; None to take it from the dataset's ``species``, or else from the
            largest species index.
        reference_energies: Known energy of each species in eV; None for those that are fitted.

    Returns:
        The statistics.

    Raises:
        ValueError: The dataset is empty, or has a species index that is not below ``num_species``.
    """
    if not len(dataset):
        raise ValueError("statistics of an empty dataset; expected at least one structure")
    num_species = num_species or _num_species(dataset)
    lone, others = _Sums(), _Sums()
    for index in range(len(dataset)):
        sample = dataset[index]
        is_lone = sample[keys.POSITIONS].shape[0] == 1 and sample[keys.EDGE_INDEX].shape[1] == 0
        (lone if is_lone else others).add(sample)
    sums = others if others.counts else lone
    largest = max(len(counts) for counts in [*lone.counts, *others.counts]) - 1
    num_species = num_species or largest + 1
    if largest >= num_species:
        raise ValueError(f"the data has species index {largest}, num_species={num_species}; expected a smaller index")

    known = list(reference_energies or [None] * num_species)
    if len(known) != num_species:
        raise ValueError(f"{len(known)} reference energies of {num_species} species; expected one for each, or None")
    counts = np.stack([np.pad(one, (0, num_species - len(one))) for one in sums.counts]).astype(np.float64)
    shifts = np.array([0.0 if energy is None else energy for energy in known])
    fitted = np.array([energy is None for energy in known])
    has_energy = np.isfinite(sums.energies)
    counts, energies = counts[has_energy], np.array(sums.energies)[has_energy]
    shifts[fitted] = np.linalg.lstsq(counts[:, fitted], energies - counts @ shifts, rcond=None)[0]
    shifts[fitted & (counts.sum(axis=0) == 0)] = 0.0
    residuals = (energies - counts @ shifts) / counts.sum(axis=1)
    return DatasetStatistics(
        energy_shifts=tuple(shifts.tolist()),
        energy_rms=float(np.sqrt(np.mean(residuals**2))) if len(residuals) else 0.0,
        force_rms=float(np.sqrt(sums.force_square / max(sums.num_forces, 1))),
        avg_num_neighbors=sums.num_edges / sums.num_atoms,
        num_structures=len(sums.counts),
        num_atoms=sums.num_atoms,
        num_edges=sums.num_edges,
    )


@dataclass
class _Sums:
    """Sums over samples."""

    counts: list[NDArray[np.int64]] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    force_square: float = 0.0
    num_forces: int = 0
    num_atoms: int = 0
    num_edges: int = 0

    def add(self, sample: dict[str, Tensor]) -> None:
        forces = sample[keys.FORCES].double().numpy()
        forces = forces[np.isfinite(forces)]
        self.counts.append(np.bincount(sample[keys.SPECIES].numpy()))
        self.energies.append(float(sample[keys.ENERGY].sum()))
        self.force_square += float((forces**2).sum())
        self.num_forces += forces.size
        self.num_atoms += sample[keys.POSITIONS].shape[0]
        self.num_edges += sample[keys.EDGE_INDEX].shape[1]


def _num_species(dataset: Any) -> int | None:
    """Returns the length of the species list of a dataset, or of the dataset that it is a subset of."""
    while dataset is not None:
        species = getattr(dataset, "species", None)
        if species is not None:
            return len(species)
        dataset = getattr(dataset, "dataset", None)
    return None
