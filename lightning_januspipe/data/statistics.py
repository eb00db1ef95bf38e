"""Computes the statistics of a dataset that a model is initialised with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_januspipe import keys


@dataclass(frozen=True)
class DatasetStatistics:
    """Holds what a model needs to start near the scale of its data.

    Attributes:
        energy_shifts: Energy of each species in eV (one value per species index), by least squares over the total
            energies. Where compositions do not determine them, the smallest shifts that fit; 0 for absent species.
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


def dataset_statistics(dataset: Dataset[dict[str, Tensor]], num_species: int | None = None) -> DatasetStatistics:
    """Compute statistics over all samples of a dataset, in float64.

    Args:
        dataset: Map-style dataset of samples, for instance a ``StructureDataset`` or a ``Subset`` of one.
        num_species: Length of the species list; None to take it from the dataset's ``species``, or else from the
            largest species index.

    Returns:
        The statistics.

    Raises:
        ValueError: The dataset is empty, has structures without labels, or has a species index that is not below
            ``num_species``.
    """
    samples = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    if not samples:
        raise ValueError("statistics of an empty dataset; expected at least one structure")
    largest = max(int(sample[keys.SPECIES].max()) for sample in samples)
    if num_species is None:
        num_species = _num_species(dataset) or largest + 1
    if largest >= num_species:
        raise ValueError(f"the data has species index {largest}, num_species={num_species}; expected a smaller index")

    counts = np.stack([np.bincount(sample[keys.SPECIES].numpy(), minlength=num_species) for sample in samples])
    counts = counts.astype(np.float64)
    energies = np.array([float(sample[keys.ENERGY].sum()) for sample in samples])
    forces = _concatenate(sample[keys.FORCES] for sample in samples)
    if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
        raise ValueError("the dataset has structures without energy or forces labels; statistics need them all")

    shifts = np.linalg.lstsq(counts, energies, rcond=None)[0]
    shifts[counts.sum(axis=0) == 0] = 0.0
    residuals = (energies - counts @ shifts) / counts.sum(axis=1)
    num_atoms = sum(sample[keys.POSITIONS].shape[0] for sample in samples)
    num_edges = sum(sample[keys.EDGE_INDEX].shape[1] for sample in samples)
    return DatasetStatistics(
        energy_shifts=tuple(shifts.tolist()),
        energy_rms=float(np.sqrt(np.mean(residuals**2))),
        force_rms=float(np.sqrt(np.mean(forces**2))),
        avg_num_neighbors=num_edges / num_atoms,
        num_structures=len(samples),
        num_atoms=num_atoms,
        num_edges=num_edges,
    )


def _num_species(dataset: Any) -> int | None:
    """Return the length of the species list of a dataset, or of the dataset that it is a subset of."""
    while dataset is not None:
        species = getattr(dataset, "species", None)
        if species is not None:
            return len(species)
        dataset = getattr(dataset, "dataset", None)
    return None


def _concatenate(tensors: Iterable[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.double().numpy() for tensor in tensors])
