"""Callbacks: training throughput, the timeline of a pipelined step, and the errors before and after training."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_januspipe import keys
from lightning_januspipe.engine.microbatch import MicroBatches
from lightning_januspipe.schedule import draw
from lightning_januspipe.schedule.trace import write_chrome_trace

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

POSITION_KEYS = (keys.POSITIONS, "pos", "_positions")
"""Names under which batches hold the (N, 3) positions: here and in ASE's ways, in PyG and NequIP, in SchNetPack."""


class Throughput(Callback):
    """Logs how many atoms and structures are trained on per second, over all replicas.

    The values are means over a moving window of batches. The time of validations is left out, and so is the first
    batch of a run, which may include compilation or the capture of a potential.

    Args:
        window: Number of batches in the window.

    Raises:
        ValueError: ``window`` is below 1.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.Throughput
              init_args: {window: 20}
    """

    def __init__(self, window: int = 20) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window}; expected a number of batches of at least 1")
        self._batches: deque[tuple[float, int, int]] = deque(maxlen=window)
        self._last_end: float | None = None
        self._is_first = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier run measured."""
        self._batches.clear()
        self._is_first = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new interval."""
        self._last_end = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of the validation out."""
        self._last_end = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a new interval where there is none."""
        if self._last_end is None and not self._is_first:
            self._last_end = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the throughput up to this batch."""
        now = time.perf_counter()
        if self._last_end is not None:
            atoms, structures = count_atoms(batch), count_structures(batch)
            self._batches.append((now - self._last_end, atoms, structures))
            seconds = sum(interval for interval, _, _ in self._batches)
            # Under JanusPipe the world size that the Trainer reports is that of the replicas.
            for name, total in (
                ("atoms_per_s", sum(atoms for _, atoms, _ in self._batches)),
                ("structures_per_s", sum(structures for _, _, structures in self._batches)),
            ):
                rate = trainer.world_size * total / seconds if seconds > 0 else 0.0
                pl_module.log(name, rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._last_end = now
        self._is_first = False


class PipelineTimeline(Callback):
    """Draws one training step as it ran on all ranks of a pipeline, beside the prediction for it.

    Writes ``pipeline-step-N.svg`` (or ``.png``) and ``pipeline-step-N.json``, a trace for ``ui.perfetto.dev``. The
    prediction is the simulation with the phase times that the schedule was made for; these are measured in the second
    to fourth step of training, so a later step compares best. The step that is recorded starts with a barrier and ends
    with an exchange of times, so it is a little longer than others.

    Args:
        step: Number of the training batch to record, from 0 on, counted from the start of ``fit``.
        dirpath: Folder for the files; the logger's folder by default, or the Trainer's ``default_root_dir``.
        suffix: ``svg`` or ``png``.

    Raises:
        ValueError: ``step`` is negative or ``suffix`` is another.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.PipelineTimeline
              init_args: {step: 10}
    """

    def __init__(self, step: int = 10, dirpath: str | None = None, suffix: str = "svg") -> None:
        super().__init__()
        if step < 0:
            raise ValueError(f"step={step}; expected the number of a training batch, 0 or more")
        if f".{suffix}" not in draw.SUFFIXES:
            raise ValueError(f"suffix={suffix!r}; expected one of {', '.join(e[1:] for e in draw.SUFFIXES)}")
        self.step, self.dirpath, self.suffix = step, dirpath, suffix
        self._num_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._num_batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the recording."""
        if self._num_batches == 0 and not hasattr(_runner(trainer), "record_next_step"):
            raise ValueError(
                "PipelineTimeline draws the steps of a pipeline, but this run has none; use "
                "Trainer(strategy='januspipe') with at least two processes, or leave the callback out"
            )
        if self._num_batches == self.step:
            _runner(trainer).record_next_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw what was recorded, on one rank."""
        self._num_batches += 1
        if self._num_batches != self.step + 1:
            return
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)  # log_dir asks all ranks
        if not trainer.is_global_zero:
            return
        found = _runner(trainer).recorded_step()
        rows = [("predicted", found.schedule, found.predicted), ("recorded", found.schedule, found.recorded)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pipeline-step-{self.step}"
        title = f"{found.schedule.name}, {found.schedule.num_ranks} ranks"
        draw.gantt(rows, path.with_suffix(f".{self.suffix}"), unit="s", title=title)
        write_chrome_trace(rows, path.with_suffix(".json"))
        print(
            f"januspipe: step {self.step} took {found.recorded.makespan:.3f} s in the pipeline (predicted "
            f"{found.predicted.makespan:.3f} s), bubbles {100 * found.recorded.bubble_fraction:.1f} % (predicted "
            f"{100 * found.predicted.bubble_fraction:.1f} %); timeline in {path.with_suffix('.' + self.suffix)}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the step did not come."""
        if trainer.is_global_zero and self._num_batches <= self.step:
            warnings.warn(
                f"PipelineTimeline: training ended after {self._num_batches} batches, before step {self.step} that was "
                "to be drawn; ask for an earlier one",
                stacklevel=2,
            )


def _runner(trainer: Trainer) -> Any:
    return getattr(trainer.strategy, "runner", None)


def count_atoms(batch: Any) -> int:
    """N of a batch, summed over its micro-batches; 0 where no positions are found."""
    if isinstance(batch, MicroBatches):
        return sum(count_atoms(part) for part in batch.batches)
    for name in POSITION_KEYS:
        positions = _get(batch, name)
        if positions is not None:
            return int(positions.shape[0])
    return 0


def count_structures(batch: Any) -> int:
    """B of a batch, summed over its micro-batches; 1 where nothing tells."""
    if isinstance(batch, MicroBatches):
        return sum(batch.num_samples)
    for name in (keys.CELL, keys.ENERGY):
        value = _get(batch, name)
        if value is not None and value.dim() > 0:
            return int(value.shape[0])
    num_graphs = getattr(batch, "num_graphs", None)  # PyG batches
    if num_graphs is not None:
        return int(num_graphs)
    structure = _get(batch, keys.BATCH)
    return 1 if structure is None or not len(structure) else int(structure.max()) + 1


def _get(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


@dataclass(frozen=True)
class Quantity:
    """A row of the table.

    Attributes:
        metric: Name of the logged value without the prefix of its stage.
        label: What the table calls it.
        unit: Unit in the table, a thousandth of that of the logged value.
    """

    metric: str
    label: str
    unit: str


QUANTITIES = tuple(
    Quantity(f"{name}_{kind}", f"{label} {kind.upper()}", unit)
    for name, label, unit in (
        (keys.ENERGY, "energy", "meV/atom"),
        (keys.FORCES, "force", "meV/Å"),
        (keys.STRESS, "stress", "meV/Å³"),
    )
    for kind in ("mae", "rmse")
)


@dataclass
class Errors:
    """Logged values by stage of a run, each a mapping from a metric's name without prefix to its value.

    Attributes:
        before: Of the validation data before training (from Lightning's sanity check).
        after: Of the validation data, at the last validation.
        test: Of the test data.
        before_is_partial: Whether ``before`` covers the first validation batches only.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    before_is_partial: bool = False

    def known(self) -> list[Quantity]:
        """The quantities that have a value."""
        return [q for q in QUANTITIES if any(q.metric in values for values in (self.before, self.after, self.test))]


class ErrorReport(Callback):
    """Collects the errors that a module logs as ``{val,test}_{energy,forces,stress}_{mae,rmse}``, for a table.

    The errors before training are those of Lightning's sanity check, which covers all of the validation data with
    ``Trainer(num_sanity_val_steps=-1)`` and its first batches else.

    Args:
        print_after_fit: Print the table when ``fit`` ends. The command line turns it off and prints the table itself,
            after the test.

    Attributes:
        errors: What was collected so far.
    """

    def __init__(self, print_after_fit: bool = True) -> None:
        super().__init__()
        self.print_after_fit = print_after_fit
        self.errors = Errors()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the errors of the validation data."""
        values = _logged(trainer, "val_")
        if trainer.sanity_checking:
            self.errors.before = values
            self.errors.before_is_partial = trainer.num_sanity_val_batches != trainer.num_val_batches
        else:
            self.errors.after = values

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the errors of the test data."""
        self.errors.test = _logged(trainer, "test_")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, on the first process."""
        if self.print_after_fit:
            self.print(trainer)

    def print(self, trainer: Trainer) -> None:
        """Print the table and the path of the best or last checkpoint, on the first process only."""
        if not trainer.is_global_zero:
            return
        console = Console()
        if self.errors.known():
            console.print(error_table(self.errors))
            if drop := describe_drop(self.errors):
                console.print(drop)
        if path := checkpoint_path(trainer):
            console.print(f"Checkpoint: {path}", soft_wrap=True, highlight=False)


def error_table(errors: Errors) -> Table:
    """Table of the collected errors; columns and rows without values are left out."""
    columns: dict[str, dict[str, float]] = {}
    if errors.before:
        columns["before"] = errors.before
    if errors.after:
        columns["after"] = errors.after
    if errors.before and errors.after:
        columns["times lower"] = {q.metric: _ratio(errors, q.metric) / 1000 for q in QUANTITIES}
    if errors.test:
        columns["test"] = errors.test
    caption = None
    if errors.after:
        caption = "before, after: validation data" if errors.before else "after: validation data"
        if errors.before_is_partial:
            caption += "\nbefore: its first batches"
        if errors.test:
            caption += "\ntest: test data"
    table = Table(title="Errors before and after training", caption=caption)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for quantity in errors.known():
        values = (1000 * column.get(quantity.metric, math.nan) for column in columns.values())
        table.add_row(f"{quantity.label} ({quantity.unit})", *(_format(value) for value in values))
    return table


def describe_drop(errors: Errors) -> str:
    """One sentence on the drop of the force error over the training; empty where it is not known."""
    metric = f"{keys.FORCES}_mae"
    ratio = _ratio(errors, metric)
    if math.isnan(ratio):
        return ""
    before, after = 1000 * errors.before[metric], 1000 * errors.after[metric]
    change = f"{_format(ratio)} times lower" if ratio >= 1 else f"{_format(1 / ratio)} times HIGHER"
    return f"Force error (MAE) on the validation data: {_format(before)} → {_format(after)} meV/Å, {change}."


def checkpoint_path(trainer: Trainer) -> str:
    """Path of the best checkpoint, of the last one where none is best; empty where there is none."""
    callback = trainer.checkpoint_callback
    return str(getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", ""))


def _logged(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }


def _ratio(errors: Errors, metric: str) -> float:
    before, after = errors.before.get(metric, math.nan), errors.after.get(metric, math.nan)
    return before / after if after > 0 else math.nan


def _format(value: float) -> str:
    """Three significant digits; a dash where there is no value."""
    if math.isnan(value):
        return "–"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
