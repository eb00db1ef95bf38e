"""Computes the statistics of a dataset that a model starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.data.facts_table import facts_of
from lightning_januspipe.data.labels import Floats

_BLOCK = 65536
"""Structures whose compositions are in memory at a time."""


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
            smallest shifts that fit; 0 for absent species. Of data with several tasks they are those of the first one.
        task_shifts: The same for each task, by its name; empty unless there are several tasks.
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
    task_shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def dataset_statistics(
    dataset: SampleDataset,
    num_species: int | None = None,
    reference_energies: Sequence[float | None] | Mapping[str, Sequence[float | None]] | None = None,
) -> DatasetStatistics:
    """Computes statistics over all samples of a dataset, in float64.

    Lone atoms without neighbours do not count, unless there is nothing else. Labels that are NaN are left out. The
    energies of each of the dataset's tasks, if it has several, are fitted by themselves.

    Args:
        dataset: Map-style dataset of samples, for instance a ``StructureDataset`` or a ``Subset`` of one.
        num_species: Length of the species list; None to take it from the dataset's ``species``, or else from the
            largest species index.
        reference_energies: Known energy of each species in eV, or such a list by the name of the task; None for those
            that are fitted.

    Returns:
        The statistics.

    Raises:
        ValueError: The dataset is empty, or has a species index that is not below ``num_species``.
    """
    if not len(dataset):
        raise ValueError("statistics of an empty dataset; expected at least one structure")
    num_species = num_species or _num_species(dataset)
    sums = _sums_of_facts(dataset) or _sums_of_samples(dataset)
    largest = sums.largest
    num_species = num_species or largest + 1
    if largest >= num_species:
        raise ValueError(f"the data has species index {largest}, num_species={num_species}; expected a smaller index")

    tasks = [str(name) for name in _attribute(dataset, "tasks") or ()]
    several = len(tasks) > 1
    found: dict[str, tuple[float, ...]] = {}
    squares, num_known = 0.0, 0
    for index, name in enumerate(tasks if several else ["default"]):
        known = reference_energies.get(name) if isinstance(reference_energies, Mapping) else reference_energies
        chosen = np.isfinite(sums.energies) & (sums.of_task(index, tasks) if several else True)
        shifts, square = _fitted_shifts(sums, np.flatnonzero(chosen), num_species, known)
        found[name] = tuple(shifts.tolist())
        squares, num_known = squares + square, num_known + int(chosen.sum())
    return DatasetStatistics(
        energy_shifts=next(iter(found.values())),
        task_shifts=found if several else {},
        energy_rms=float(np.sqrt(squares / num_known)) if num_known else 0.0,
        force_rms=float(np.sqrt(sums.force_square / max(sums.num_forces, 1))),
        avg_num_neighbors=sums.num_edges / sums.num_atoms,
        num_structures=len(sums.energies),
        num_atoms=sums.num_atoms,
        num_edges=sums.num_edges,
    )


def _fitted_shifts(
    sums: _Sums, positions: NDArray[np.int64], num_species: int, known: Sequence[float | None] | None
) -> tuple[Floats, float]:
    """Returns the energies of atoms of some structures, and the sum of the squares of what is left per atom."""
    known = list(known or [None] * num_species)
    if len(known) != num_species:
        raise ValueError(f"{len(known)} reference energies of {num_species} species; expected one for each, or None")
    shifts = np.array([0.0 if energy is None else energy for energy in known])
    fitted = np.array([energy is None for energy in known])

    def blocks() -> Iterator[tuple[Floats, Floats]]:
        """Yields the numbers of atoms of each species, and the energies, of some structures at a time."""
        for start in range(0, len(positions), _BLOCK):
            some = positions[start : start + _BLOCK]
            counts = np.zeros((len(some), num_species))
            counts[:, : sums.largest + 1] = sums.counts(some)
            yield counts, sums.energies[some]

    seen = sum((counts.sum(axis=0) for counts, _ in blocks()), np.zeros(num_species))
    shifts[fitted] = _least_squares(
        int(fitted.sum()), ((counts[:, fitted], left - counts @ shifts) for counts, left in blocks())
    )
    shifts[fitted & (seen == 0)] = 0.0
    squares = [(((left - counts @ shifts) / counts.sum(axis=1)) ** 2).sum() for counts, left in blocks()]
    return shifts, float(sum(squares))


@dataclass(frozen=True)
class _Sums:
    """Holds what the statistics of n structures are computed from.

    Attributes:
        energies: (n,) energies in eV.
        counts: Function that returns the numbers of atoms of each species index up to ``largest`` in some structures.
        largest: Largest species index, in left out lone atoms too.
        of_task: Function of the index of a task and the names of all, that returns which structures have it, (n,).
    """

    energies: Floats
    counts: Callable[[NDArray[np.int64]], NDArray[Any]]
    largest: int
    force_square: float
    num_forces: int
    num_atoms: int
    num_edges: int
    of_task: Callable[[int, Sequence[str]], NDArray[np.bool_]]


def _sums_of_facts(dataset: Any) -> _Sums | None:
    """Returns the sums of a dataset that knows facts about its structures; None for other datasets."""
    facts = facts_of(dataset)
    species: Sequence[str] | None = _attribute(dataset, "species")
    if facts is None or species is None:
        return None
    columns = {atomic_numbers[symbol]: column for column, symbol in enumerate(species)}
    largest = max(columns[number] for number in facts.all_elements())
    if not facts.rows["is_lone"].all():
        facts = facts.take(~facts.rows["is_lone"])
    rows = facts.rows
    return _Sums(
        energies=rows["energy"].copy(),
        counts=lambda some: facts.take(some).counts(columns)[:, : largest + 1],
        largest=largest,
        force_square=float(rows["force_square"].sum()),
        num_forces=int(rows["num_forces"].sum()),
        num_atoms=int(rows["num_atoms"].sum()),
        num_edges=int(rows["num_edges"].sum()),
        of_task=lambda index, names: facts.of_task(names[index]),
    )


def _sums_of_samples(dataset: SampleDataset) -> _Sums:
    """Returns the sums over all samples of a dataset."""
    found = []
    for index in range(len(dataset)):
        sample = dataset[index]
        num_atoms, num_edges = sample[keys.POSITIONS].shape[0], sample[keys.EDGE_INDEX].shape[1]
        forces = sample[keys.FORCES].double().numpy()
        forces = forces[np.isfinite(forces)]
        energy = float(sample[keys.ENERGY].sum())
        counts = np.bincount(sample[keys.SPECIES].numpy())
        task = int(sample[keys.TASK]) if keys.TASK in sample else 0
        found.append((counts, energy, float((forces**2).sum()), forces.size, num_atoms, num_edges, task))
    chosen = [one for one in found if one[4:6] != (1, 0)] or found
    largest = max(len(one[0]) for one in found) - 1
    counts = np.stack([np.pad(one[0], (0, largest + 1 - len(one[0]))) for one in chosen])
    return _Sums(
        energies=np.array([one[1] for one in chosen]),
        counts=lambda some: counts[some],
        largest=largest,
        force_square=sum(one[2] for one in chosen),
        num_forces=sum(one[3] for one in chosen),
        num_atoms=sum(one[4] for one in chosen),
        num_edges=sum(one[5] for one in chosen),
        of_task=lambda index, _: np.array([one[6] == index for one in chosen]),
    )


def _least_squares(num_columns: int, blocks: Iterator[tuple[Floats, Floats]]) -> Floats:
    """Returns the smallest solution of least squares over all rows, some of which are in memory at a time."""
    rows: Any
    values: Any
    rows, values = next(blocks, (np.zeros((0, num_columns)), np.zeros(0)))
    for more, right in blocks:
        # The triangular factor of the rows so far stands for them.
        stacked = np.column_stack([np.concatenate([rows, more]), np.concatenate([values, right])])
        reduced = np.linalg.qr(stacked)[1]
        rows, values = reduced[:, :-1], reduced[:, -1]
    found: Floats = np.linalg.lstsq(rows, values, rcond=None)[0]
    return found


def _attribute(dataset: Any, name: str) -> Any:
    """Returns an attribute of a dataset, or of the dataset that it is a subset of; None where there is none."""
    while dataset is not None:
        found = getattr(dataset, name, None)
        if found is not None:
            return found
        dataset = getattr(dataset, "dataset", None)
    return None


def _num_species(dataset: Any) -> int | None:
    species = _attribute(dataset, "species")
    return None if species is None else len(species)
