"""Writes what a test tells beyond mean errors: errors of groups, pictures, and the hardest structures."""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.callbacks.error_groups import ErrorGroups
from lightning_januspipe.callbacks.error_report import format_error
from lightning_januspipe.callbacks.lightning_classes import (
    Callback,
    LightningModule,
    Trainer,
    check_suffix,
    output_folder,
)
from lightning_januspipe.callbacks.parity_plots import draw_learning_curves, draw_parity
from lightning_januspipe.callbacks.prediction_writer import predicted_structure
from lightning_januspipe.callbacks.records import Floats, Record, Recording, Records, structure_of


class EvaluationReport(Callback):
    """Prints the errors of a test by element, ``config_type`` and number of atoms, and writes files.

    The folder gets

    - ``errors.csv``: the errors of all groups;
    - ``parity-energy``, ``parity-forces`` and ``parity-stress``: predictions against labels, with densities and
      histograms of the errors;
    - ``hardest.extxyz``: the structures with the largest errors of forces (of energies where there are no forces), with
      predictions and labels as :class:`PredictionWriter` writes them;
    - ``learning-curves``, after a fit: errors over the epochs.

    Pictures also go to the loggers of Weights & Biases and TensorBoard. It works with any strategy, with a
    :class:`~lightning_januspipe.models.PotentialModule` and a
    :class:`~lightning_januspipe.data.StructureDataModule`; of a test with others it warns that there is no report.

    Args:
        dirpath: The folder, which all machines share; by default ``evaluation`` in the logger's folder, or in the
            Trainer's ``default_root_dir``.
        num_hardest: Number of structures that are listed and written as the hardest.
        suffix: ``png`` or ``svg``. Loggers get PNG only.
        prints: Print the tables; without it only the folder is said.

    Raises:
        ValueError: The suffix is neither of the two, or the number is negative.

    .. code-block:: yaml

        trainer:
          callbacks+:
            - class_path: lightning_januspipe.callbacks.EvaluationReport
    """

    def __init__(
        self, dirpath: str | None = None, num_hardest: int = 10, suffix: str = "png", prints: bool = True
    ) -> None:
        super().__init__()
        check_suffix(suffix)
        if num_hardest < 0:
            raise ValueError(f"num_hardest={num_hardest}; expected a number of structures, at least 0")
        self.dirpath, self.num_hardest, self.suffix, self.prints = dirpath, num_hardest, suffix, prints
        self._recording: Recording | None = None
        self._history: list[dict[str, float]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the curves anew."""
        self._history = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the logged values of an epoch."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        rates = [group["lr"] for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups[:1]]
        self._history.append({"epoch": trainer.current_epoch, **values, **({"lr": float(rates[0])} if rates else {})})

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the curves, on the first process."""
        folder = self._folder(trainer)
        measured = [epoch for epoch in self._history if epoch.get("val_loss", math.nan) > 0]
        if trainer.is_global_zero and len(measured) > 1:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"learning-curves.{self.suffix}"
            draw_learning_curves(self._history, path, "Errors in training")
            _give_to_loggers(trainer, path)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file of this replica."""
        loaders = trainer.test_dataloaders
        is_one = not isinstance(loaders, (list, tuple)) or len(loaders) == 1
        self._recording = Recording(trainer, self._folder(trainer), "test") if is_one else None

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the predictions of a batch."""
        if self._recording is None:
            return
        if not isinstance(outputs, Mapping) or keys.SAMPLE_INDEX not in outputs:
            self._recording = None  # on all ranks, which have the same module and kind of data
            if trainer.is_global_zero:
                warnings.warn(
                    f"EvaluationReport: the test_step of {type(pl_module).__name__} returns no predictions with "
                    f"'{keys.SAMPLE_INDEX}', as that of PotentialModule does with a StructureDataModule; there is no "
                    "report",
                    stacklevel=2,
                )
            return
        self._recording.add(outputs, batch)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the tables and writes the files, on the first process."""
        if self._recording is None:
            return
        folder = self._folder(trainer)
        records = self._recording.finish(trainer)
        self._recording = None
        if records is None:
            return
        loaders: Any = trainer.test_dataloaders
        dataset = (loaders[0] if isinstance(loaders, (list, tuple)) else loaders).dataset
        self._report(trainer, folder, records, dataset)
        records.remove()

    def _report(self, trainer: Trainer, folder: Path, records: Records, dataset: Any) -> None:
        groups, pairs, hardest = ErrorGroups(), _Pairs(), _Hardest(self.num_hardest)
        for record in records:
            info = structure_of(dataset, record.index).info
            groups.add(record, info)
            pairs.add(record, str(info.get(keys.TASK, "")))
            hardest.add(record)
        if not groups.known():
            warnings.warn("EvaluationReport: no test structure has labels; there is no report", stacklevel=2)
            return
        folder.mkdir(parents=True, exist_ok=True)
        groups.write_csv(folder / "errors.csv")
        for quantity in groups.known():
            given, predicted, note = pairs.of(quantity)
            path = folder / f"parity-{quantity}.{self.suffix}"
            draw_parity(quantity, given, predicted, path, f"{quantity.capitalize()}, test data", note)
            _give_to_loggers(trainer, path)
        chosen = [(record, structure_of(dataset, record.index)) for record in hardest.records()]
        if chosen:
            frames = [predicted_structure(atoms, record) for record, atoms in chosen]
            for frame, (record, _) in zip(frames, chosen, strict=True):
                frame.info["test_index"] = record.index
            ase.io.write(folder / "hardest.extxyz", frames, format="extxyz")
        console = Console()
        for table in groups.tables() if self.prints else ():
            console.print(table)
        if chosen and self.prints:
            console.print(_hardest_table(chosen))
        console.print(f"Report: {folder}", soft_wrap=True, highlight=False)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath is not None else output_folder(trainer, None) / "evaluation"


class _Pairs:
    """Collects labels and predictions for pictures."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Floats, Floats]]] = {name: [] for name in ("energy", "forces", "stress")}
        self._compositions: list[Mapping[tuple[str, int], float]] = []

    def add(self, record: Record, task: str) -> None:
        """Adds a structure; labels that are NaN are left out."""
        num_atoms = len(record.numbers)
        if math.isfinite(record.given_energy):
            energies = np.array([record.given_energy]) / num_atoms, np.array([record.energy]) / num_atoms
            self._values[keys.ENERGY].append(energies)
            numbers, counts = np.unique(record.numbers, return_counts=True)
            elements = [(task, number) for number in numbers.tolist()]
            self._compositions.append(dict(zip(elements, (counts / num_atoms).tolist(), strict=True)))
        for name, given, predicted in (
            (keys.FORCES, record.given_forces.ravel(), record.forces.ravel()),
            (keys.STRESS, record.given_stress.ravel(), record.stress.ravel()),
        ):
            known = np.isfinite(given)
            self._values[name].append((given[known], predicted[known]))

    def of(self, quantity: str) -> tuple[Floats, Floats, str]:
        """Returns labels, predictions, and what they are relative to.

        Energies per atom are shown without the energies of atoms, which are fitted to the labels of each task by least
        squares: they can be thousands of eV, and their differences between elements would hide all others.
        """
        given, predicted = (np.concatenate(values) for values in zip(*self._values[quantity], strict=True))
        if quantity != keys.ENERGY:
            return given, predicted, ""
        elements = sorted({element for composition in self._compositions for element in composition})
        shares = np.array([[one.get(element, 0.0) for element in elements] for one in self._compositions])
        of_atoms = shares @ np.linalg.lstsq(shares, given, rcond=None)[0]
        return given - of_atoms, predicted - of_atoms, " − energies of atoms"


class _Hardest:
    """Keeps the structures with the largest errors."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._heap: list[tuple[float, int, Record]] = []

    def add(self, record: Record) -> None:
        """Adds a structure, ranked by its forces, or by its energy if it has no forces."""
        score = record.force_rmse if math.isfinite(record.force_rmse) else abs(record.energy_error)
        if not self._number or not math.isfinite(score):
            return
        entry = (score, -record.index, record)
        if len(self._heap) < self._number:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def records(self) -> list[Record]:
        """Returns the structures, the hardest first."""
        return [record for _, _, record in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def _hardest_table(chosen: list[tuple[Record, Any]]) -> Table:
    table, kinds = Table(title="Hardest structures"), [str(atoms.info.get("config_type", "")) for _, atoms in chosen]
    told = ["config_type"] if any(kinds) else []
    for name in ("index", "formula", *told, "forces RMSE\n(meV/Å)", "energy error\n(meV/atom)"):
        table.add_column(name, justify="left" if name in ("formula", "config_type") else "right")
    for (record, atoms), kind in zip(chosen, kinds, strict=True):
        error = 1000 * record.energy_error
        cells = [format_error(1000 * record.force_rmse), ("−" if error < 0 else "") + format_error(abs(error))]
        formula = atoms.get_chemical_formula(empirical=False)
        table.add_row(str(record.index), formula, *([kind] if told else []), *cells)
    return table


def _give_to_loggers(trainer: Trainer, path: Path) -> None:
    """Gives a picture to the loggers that take pictures."""
    if path.suffix != ".png":
        return
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=f"evaluation/{path.stem}", images=[str(path)])
        elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
            from matplotlib.image import imread

            pixels = imread(path)[..., :3]
            logger.experiment.add_image(f"evaluation/{path.stem}", pixels, trainer.global_step, dataformats="HWC")
