"""Collects the predictions of an evaluation in files, one for each replica, and reads them in the order of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.callbacks.lightning_classes import Trainer

Floats = NDArray[np.float64]

_HEAD, _OF_ATOM = 20, 7  # numbers of a structure: two energies and two stresses; of an atom: its element, two forces


@dataclass(frozen=True)
class Record:
    """Holds what was predicted of a structure of N atoms, and what its labels are, NaN where there is none.

    Attributes:
        index: Index in the dataset.
        numbers: (N,) atomic numbers.
        energy: Predicted energy in eV.
        forces: (N, 3) predicted forces in eV/Å.
        stress: (3, 3) predicted stress in eV/Å³.
        given_energy: Energy of the label.
        given_forces: Forces of the label.
        given_stress: Stress of the label.
    """

    index: int
    numbers: NDArray[np.int64]
    energy: float
    forces: Floats
    stress: Floats
    given_energy: float
    given_forces: Floats
    given_stress: Floats

    @property
    def energy_error(self) -> float:
        """Returns the error of the energy per atom in eV; NaN without a label."""
        return (self.energy - self.given_energy) / len(self.numbers)

    @property
    def force_rmse(self) -> float:
        """Returns the root mean square error of the force components in eV/Å; NaN without labels."""
        return math.sqrt(float(np.mean((self.forces - self.given_forces) ** 2)))

    @property
    def stress_rmse(self) -> float:
        """Returns the root mean square error of the stress components in eV/Å³; NaN without a label."""
        return math.sqrt(float(np.mean((self.stress - self.given_stress) ** 2)))


class RecordWriter:
    """Writes the records of one replica to a file.

    Args:
        path: The file; it is replaced if it exists. A second one, ``PATH.npy``, says where each record begins.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("wb")
        self._places: list[tuple[int, int, int]] = []
        self._end = 0

    def add(self, prediction: Any, batch: Any) -> int:
        """Writes the structures of a batch, and returns the number of their atoms.

        Args:
            prediction: Mapping with ``energy`` (B,), ``forces`` (N, 3), ``stress`` (B, 3, 3) and ``sample_index``
                (B,); forces and stress may be missing.
            batch: The batch, see :mod:`lightning_januspipe.keys`.

        Raises:
            ValueError: The prediction is of another kind.
        """
        if not isinstance(prediction, Mapping) or not {keys.SAMPLE_INDEX, keys.ENERGY} <= prediction.keys():
            found = sorted(prediction) if isinstance(prediction, Mapping) else type(prediction).__name__
            raise ValueError(
                f"the step of the module returned {found}; expected a mapping with '{keys.ENERGY}' and "
                f"'{keys.SAMPLE_INDEX}', as of PotentialModule with a StructureDataModule"
            )
        structure = batch[keys.BATCH].cpu().numpy()
        num_structures, num_atoms = len(prediction[keys.SAMPLE_INDEX]), len(structure)
        sizes = {keys.ENERGY: (num_structures,), keys.FORCES: (num_atoms, 3), keys.STRESS: (num_structures, 3, 3)}
        values = [_array(of, name, size) for name, size in sizes.items() for of in (prediction, batch)]
        energy, given_energy, forces, given_forces, stress, given_stress = values
        numbers = batch[keys.ATOMIC_NUMBERS].cpu().double().numpy()[:, None]
        atoms = np.concatenate([numbers, forces, given_forces], axis=1)
        for place, index in enumerate(prediction[keys.SAMPLE_INDEX].tolist()):
            rows = atoms[structure == place]
            head = [[energy[place], given_energy[place]], stress[place].ravel(), given_stress[place].ravel()]
            np.concatenate([*head, rows.ravel()]).tofile(self._file)
            self._places.append((index, self._end, len(rows)))
            self._end += _HEAD + rows.size
        return num_atoms

    def close(self) -> None:
        """Finishes both files."""
        self._file.close()
        np.save(f"{self._path}.npy", np.array(self._places, dtype=np.int64).reshape(-1, 3))


class Records:
    """Reads the records of all replicas, each structure once and in the order of the dataset.

    Args:
        paths: The files of the replicas.

    Raises:
        FileNotFoundError: A replica has left no file, as when the folder is not shared by all machines.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if missing := [str(path) for path in paths if not Path(f"{path}.npy").is_file()]:
            raise FileNotFoundError(
                f"{', '.join(missing)} is not there: every replica writes its predictions to a file, which the first "
                "process reads; choose a folder that all machines share"
            )
        self._paths = list(paths)
        self._values = [_read_only(path) for path in paths]
        self._places: dict[int, tuple[int, int, int]] = {}
        for part, path in enumerate(paths):
            for index, start, num_atoms in np.load(f"{path}.npy").tolist():
                self._places[index] = part, start, num_atoms  # samplers may give a sample to two replicas

    def __len__(self) -> int:
        """Returns the number of structures."""
        return len(self._places)

    def __iter__(self) -> Iterator[Record]:
        """Yields the records by index."""
        for index in sorted(self._places):
            part, start, num_atoms = self._places[index]
            values = np.array(self._values[part][start : start + _HEAD + _OF_ATOM * num_atoms])
            atoms = values[_HEAD:].reshape(num_atoms, _OF_ATOM)
            yield Record(
                index=index,
                numbers=atoms[:, 0].astype(np.int64),
                energy=float(values[0]),
                forces=atoms[:, 1:4],
                stress=values[2:11].reshape(3, 3),
                given_energy=float(values[1]),
                given_forces=atoms[:, 4:],
                given_stress=values[11:20].reshape(3, 3),
            )

    def remove(self) -> None:
        """Deletes the files."""
        self._values = []
        for path in self._paths:
            with suppress(FileNotFoundError):
                path.unlink()
                Path(f"{path}.npy").unlink()


class Recording:
    """Collects the predictions of one evaluation on all ranks of a Trainer; every rank calls all of its methods.

    Args:
        trainer: The Trainer of the run that is recorded.
        folder: Folder for the files in the meantime, shared by all machines.
        name: Beginning of their names.
    """

    def __init__(self, trainer: Trainer, folder: Path, name: str) -> None:
        sharing: Mapping[str, int] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        mesh = getattr(trainer.strategy, "mesh", None)
        self._paths = [folder / f".{name}.{replica}" for replica in range(sharing.get("num_replicas", 1))]
        # All ranks of a replica have the same predictions.
        self._writer = (
            RecordWriter(self._paths[sharing.get("rank", 0)]) if mesh is None or not mesh.replica_rank else None
        )
        self.num_atoms = 0

    def add(self, prediction: Any, batch: Any) -> None:
        """Adds the predictions of a batch."""
        if self._writer is not None:
            self.num_atoms += self._writer.add(prediction, batch)

    def finish(self, trainer: Trainer) -> Records | None:
        """Returns all records on the first rank, and None on the others."""
        if self._writer is not None:
            self._writer.close()
        trainer.strategy.barrier("januspipe: predictions are written")
        return Records(self._paths) if trainer.is_global_zero else None


def structure_of(dataset: Any, index: int) -> Any:
    """Returns a structure of a dataset as ASE has read it.

    Args:
        dataset: A dataset with ``atoms(index)``, such as a ``StructureDataset``, or a ``Subset`` of one.
        index: Index in the dataset.

    Raises:
        ValueError: The dataset does not know its structures.
    """
    while not callable(getattr(dataset, "atoms", None)):
        if not hasattr(dataset, "indices") or not hasattr(dataset, "dataset"):
            raise ValueError(
                f"{type(dataset).__name__} has no atoms(index) to take structures from; expected a StructureDataset, "
                "or a Subset of one"
            )
        index, dataset = dataset.indices[index], dataset.dataset
    return dataset.atoms(index)


def files_of(dataset: Any) -> list[Path]:
    """Returns the files that a dataset, or a ``Subset`` of it, has read its structures from."""
    while not hasattr(dataset, "files") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return getattr(dataset, "files", [])


def dataset_of(loaders: Any) -> Any:
    """Returns the dataset of the one loader of an evaluation.

    Raises:
        ValueError: There are several loaders.
    """
    found = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    if len(found) != 1:
        raise ValueError(f"{len(found)} loaders; expected one, whose structures are written in their order")
    return found[0].dataset


def is_known(values: Floats | float) -> bool:
    """Returns whether all values are there."""
    return bool(np.isfinite(values).all())


def _array(values: Mapping[str, Tensor], name: str, size: tuple[int, ...]) -> Floats:
    """Returns values as an array in float64; NaN where there are none."""
    return values[name].detach().cpu().double().numpy().reshape(size) if name in values else np.full(size, np.nan)


def _read_only(path: Path) -> Floats:
    return np.memmap(path, dtype=np.float64, mode="r") if path.stat().st_size else np.zeros(0)
