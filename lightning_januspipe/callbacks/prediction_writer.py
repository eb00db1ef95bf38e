"""Writes the predictions of a potential to a file of structures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import Trajectory
from ase.io.formats import filetype, ioformats
from ase.stress import full_3x3_to_voigt_6_stress
from rich.console import Console
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.callbacks.error_groups import ErrorGroups
from lightning_januspipe.callbacks.lightning_classes import Callback, LightningModule, Trainer
from lightning_januspipe.callbacks.records import Record, Recording, dataset_of, files_of, is_known, structure_of

_CHUNK = 256
"""So many structures are written at a time."""

_ERRORS = ("energy_error", "force_rmse", "stress_rmse")
"""Names under which structures have the errors of their predictions."""

_APPENDED = ("extxyz", "xyz", "db")
"""Formats in which structures can be written after those of a file."""


class PredictionWriter(Callback):
    """Writes what ``predict`` computes to a file of any format that ASE writes, each structure once and in order.

    The structures of the file have ``energy`` (eV), ``forces`` (eV/Å) and, if periodic, ``stress`` (eV/Å³) as
    results of a calculator, where ASE and most programs look for them. Labels of the data are kept as ``given_energy``,
    ``given_forces`` and ``given_stress``, with ``energy_error`` (eV/atom), ``force_rmse`` (eV/Å) and ``stress_rmse``
    (eV/Å³) beside them, and everything else that a structure had stays. ``given_stress`` has the six components
    xx, yy, zz, yz, xz and xy.

    Each replica writes its predictions to a file beside the output as they come, and the first process makes one of
    them in the end, so that no process ever holds all. It prints the throughput, and a table of errors if there are
    labels. It works with any strategy, with a :class:`~lightning_januspipe.models.PotentialModule` and a
    :class:`~lightning_januspipe.data.StructureDataModule`.

    Args:
        output: The file, in a folder that all machines share. Its ending tells the format: ``.extxyz``, ``.traj``,
            ``.db`` and others.

    Raises:
        ValueError: ASE does not write such files, or not with several structures; the output is a folder, or the file
            that the structures are read from.

    .. code-block:: yaml

        trainer:
          callbacks+:
            - class_path: lightning_januspipe.callbacks.PredictionWriter
              init_args: {output: predictions.extxyz}
    """

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = Path(output)
        if self.output.is_dir():
            raise ValueError(f"output={output!r} is a folder; expected a file, such as {self.output / 'out.extxyz'}")
        self._format = _format_of(self.output)
        self._recording: Recording | None = None
        self._start = 0.0

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file of this replica."""
        read = files_of(dataset_of(trainer.predict_dataloaders))
        if self.output.exists() and any(self.output.samefile(file) for file in read):
            raise ValueError(
                f"output={str(self.output)!r} is a file that the structures are read from, whose labels the "
                "predictions would replace; choose another name"
            )
        self._recording = Recording(trainer, self.output.absolute().parent, self.output.name)
        self._start = time.perf_counter()

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the predictions of a batch."""
        assert self._recording is not None, "prediction has started"
        self._recording.add(outputs, batch)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes one file of those of the replicas, on the first process."""
        assert self._recording is not None, "prediction has started"
        records = self._recording.finish(trainer)
        if records is None:
            return
        seconds = time.perf_counter() - self._start
        groups, num_atoms = ErrorGroups(), 0
        dataset = dataset_of(trainer.predict_dataloaders)

        def structures() -> Iterator[Atoms]:
            nonlocal num_atoms
            for record in records:
                given = structure_of(dataset, record.index)
                groups.add(record, given.info)
                num_atoms += len(record.numbers)
                yield predicted_structure(given, record)

        try:
            _write(structures(), self.output, self._format)
        finally:
            records.remove()
        console = Console()
        for table in groups.tables():
            console.print(table)
        console.print(
            f"Predicted {len(records):,} structures with {num_atoms:,} atoms in {seconds:.3g} s, "
            f"{num_atoms / seconds:,.0f} atoms/s: {self.output}",
            soft_wrap=True,
            highlight=False,
        )


def predicted_structure(atoms: Atoms, record: Record) -> Atoms:
    """Returns a copy of a structure with its predictions, and with its labels under other names.

    Args:
        atoms: The structure as it was read, of N atoms.
        record: What was predicted of it.
    """
    found = atoms.copy()
    results: dict[str, Any] = {"energy": record.energy, "free_energy": record.energy}
    if is_known(record.forces):
        results["forces"] = record.forces
    has_volume = bool(atoms.pbc.any()) and atoms.cell.rank == 3
    if is_known(record.stress) and has_volume:
        results["stress"] = full_3x3_to_voigt_6_stress(record.stress)
    for place in (found.info, found.arrays):
        for name in (keys.ENERGY, keys.FORCES, keys.STRESS):
            place.pop(name, None)
    for name in _ERRORS:  # of earlier predictions
        found.info.pop(name, None)
    if is_known(record.given_energy):
        found.info |= {"given_energy": record.given_energy, "energy_error": record.energy_error}
    if is_known(record.given_forces):
        found.arrays["given_forces"] = record.given_forces
        found.info["force_rmse"] = record.force_rmse
    if is_known(record.given_stress):
        # Six numbers, as ASE has them: extended XYZ has no matrices, which ASE would write as JSON.
        found.info["given_stress"] = full_3x3_to_voigt_6_stress(record.given_stress)
        found.info["stress_rmse"] = record.stress_rmse
    found.calc = SinglePointCalculator(found, **results)
    return found


def _format_of(path: Path) -> str:
    """Returns ASE's name of the format of a file that is to be written."""
    name = str(filetype(str(path), read=False))
    if name not in ioformats:
        raise ValueError(f"output={str(path)!r}: ASE knows no format of this ending; try .extxyz")
    if not ioformats[name].can_write or ioformats[name].single:
        raise ValueError(f"output={str(path)!r}: ASE writes no list of structures in the format {name!r}; try .extxyz")
    return name


def _write(structures: Iterator[Atoms], path: Path, name: str) -> None:
    """Writes structures under a hidden name, a part at a time where the format allows it, and renames the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    part.unlink(missing_ok=True)
    try:
        if name == "traj":
            with Trajectory(part, "w") as file:
                for atoms in structures:
                    file.write(atoms)
        elif name in _APPENDED:
            while chunk := list(islice(structures, _CHUNK)):
                ase.io.write(part, chunk, format=name, append=True)
        else:
            ase.io.write(part, list(structures), format=name)
    except Exception as error:  # the writers of the formats raise errors of any type
        part.unlink(missing_ok=True)
        raise ValueError(
            f"{path} could not be written as {name!r} ({type(error).__name__}: {error}); .extxyz holds all structures"
        ) from error
    part.replace(path)
