"""Prints the errors of a module before and after training as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.callbacks.base import Callback, LightningModule, Trainer


@dataclass(frozen=True)
class Quantity:
    """Describes a row of the table.

    Attributes:
        metric: Name of the logged value without ``val_`` or ``test_``.
        label: Name in the table.
        unit: Unit in the table, a thousandth of the unit of the logged value.
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
    """Holds logged values, as mappings from a metric's name without prefix to its value.

    Attributes:
        before: Values of the validation data before training, from Lightning's sanity check.
        after: Values of the validation data at the last validation.
        test: Values of the test data.
        before_is_partial: Whether ``before`` covers the first validation batches only.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    before_is_partial: bool = False

    def known(self) -> list[Quantity]:
        """Return the quantities that have a value."""
        return [q for q in QUANTITIES if any(q.metric in values for values in (self.before, self.after, self.test))]


class ErrorReport(Callback):
    """Collects the errors that a module logs as ``{val,test}_{energy,forces,stress}_{mae,rmse}``, and prints a table.

    The errors before training come from Lightning's sanity check, which covers all validation data with
    ``Trainer(num_sanity_val_steps=-1)``, otherwise its first batches.

    Args:
        print_after_fit: Print the table when ``fit`` ends. The command line prints the table itself, after the test.

    Attributes:
        errors: The values that were collected so far.
    """

    def __init__(self, print_after_fit: bool = True) -> None:
        super().__init__()
        self.print_after_fit = print_after_fit
        self.errors = Errors()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the errors of the validation data."""
        values = _logged(trainer, "val_")
        if trainer.sanity_checking:
            self.errors.before = values
            self.errors.before_is_partial = trainer.num_sanity_val_batches != trainer.num_val_batches
        else:
            self.errors.after = values

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the errors of the test data."""
        self.errors.test = _logged(trainer, "test_")

    @override
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
    """Return a table of the collected errors without empty columns and rows."""
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
    """Return a sentence on the change of the force error by training; empty if it is not known."""
    metric = f"{keys.FORCES}_mae"
    ratio = _ratio(errors, metric)
    if math.isnan(ratio):
        return ""
    before, after = 1000 * errors.before[metric], 1000 * errors.after[metric]
    change = f"{_format(ratio)} times lower" if ratio >= 1 else f"{_format(1 / ratio)} times HIGHER"
    return f"Force error (MAE) on the validation data: {_format(before)} → {_format(after)} meV/Å, {change}."


def checkpoint_path(trainer: Trainer) -> str:
    """Return the path of the best checkpoint, else of the last one; empty if there is none."""
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
    """Format with three significant digits; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
