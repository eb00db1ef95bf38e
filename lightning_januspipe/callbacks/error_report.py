"""Prints the errors of a module, before and after training, as a table with units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.callbacks.lightning_classes import Callback, LightningModule, Trainer


@dataclass(frozen=True)
class Quantity:
    """Describes a row of the table.

    Attributes:
        name: Name of the quantity in batches and weights.
        metric: Name of the logged value without ``val_`` or ``test_``.
        label: Name in the table.
        unit: Unit in the table, a thousandth of the unit of the logged value.
    """

    name: str
    metric: str
    label: str
    unit: str


QUANTITIES = tuple(
    Quantity(name, f"{name}_{kind}", f"{label} {kind.upper()}", unit)
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
        after: Values of the validation data at the last validation of a fit.
        validation: Values of the validation data outside a fit.
        test: Values of the test data.
        before_is_partial: Whether ``before`` covers the first validation batches only.
        tested: Name of the checkpoint that was tested; empty for the weights that the module had.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    before_is_partial: bool = False
    tested: str = ""

    def known(self) -> list[Quantity]:
        """Returns the quantities that have a value."""
        columns = (self.before, self.after, self.validation, self.test)
        return [q for q in QUANTITIES if any(q.metric in values for values in columns)]


class ErrorReport(Callback):
    """Collects the errors that a module logs as ``{val,test}_{energy,forces,stress}_{mae,rmse}``, and prints a table.

    The errors before training come from Lightning's sanity check, which covers all validation data with
    ``Trainer(num_sanity_val_steps=-1)``, otherwise its first batches. Quantities without labels, and those to which the
    module's ``weights`` give none, are left out.

    Args:
        prints: Print the table when a fit, a validation or a test ends. The command line prints it itself, after both
            fit and test.

    Attributes:
        errors: The values that were collected so far.
    """

    def __init__(self, prints: bool = True) -> None:
        super().__init__()
        self.prints = prints
        self.errors = Errors()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the errors of the validation data."""
        values = _logged(trainer, pl_module, "val_")
        if trainer.sanity_checking:
            self.errors.before = values
            self.errors.before_is_partial = trainer.num_sanity_val_batches != trainer.num_val_batches
        elif trainer.state.fn == "fit":
            self.errors.after = values
        else:
            self.errors.validation = values
            self._print_once(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the errors of the test data."""
        self.errors.test = _logged(trainer, pl_module, "test_")
        self.errors.tested = Path(trainer.ckpt_path).name if trainer.ckpt_path else ""
        self._print_once(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table, on the first process."""
        self._print_once(trainer)

    def _print_once(self, trainer: Trainer) -> None:
        if self.prints:
            self.print(trainer)

    def print(self, trainer: Trainer) -> None:
        """Prints the table and the path of the best or last checkpoint, on the first process only."""
        if not trainer.is_global_zero:
            return
        console = Console()
        if self.errors.known():
            console.print(error_table(self.errors))
            if change := describe_change(self.errors):
                console.print(change)
        if path := checkpoint_path(trainer):
            console.print(f"Checkpoint: {path}", soft_wrap=True, highlight=False)


def error_table(errors: Errors) -> Table:
    """Returns a table of the collected errors without empty columns and rows."""
    columns: dict[str, dict[str, float]] = {
        name: values
        for name, values in (
            ("before", errors.before),
            ("after", errors.after),
            ("validation", errors.validation),
            ("test", errors.test),
        )
        if values
    }
    compares = "before" in columns and "after" in columns
    title = "Errors before and after training" if compares else "Errors"
    table = Table(title=title, caption="\n".join(_explain(errors)) or None)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
        if compares and name == "after":
            table.add_column("change", justify="right", no_wrap=True)
    for quantity in errors.known():
        cells = []
        for name, values in columns.items():
            cells.append(format_error(1000 * values.get(quantity.metric, math.nan)))
            if compares and name == "after":
                cells.append(_describe_change(_ratio(errors, quantity.metric)))
        table.add_row(f"{quantity.label} ({quantity.unit})", *cells)
    return table


def _explain(errors: Errors) -> list[str]:
    """Returns lines that say which data and which weights each column is of, where there are several columns."""
    if not errors.after:
        return []
    both = "before, after: validation data, first and last weights"
    lines = [both if errors.before else "after: validation data, last weights"]
    if errors.before_is_partial:
        lines.append("before: first batches of the validation data")
    if errors.test:
        lines.append(f"test: test data, {f'weights of {errors.tested}' if errors.tested else 'last weights'}")
    return lines


def describe_change(errors: Errors) -> str:
    """Returns a sentence on the change of the force error by training; empty if it is not known."""
    metric = f"{keys.FORCES}_mae"
    ratio = _ratio(errors, metric)
    if math.isnan(ratio):
        return ""
    before, after = 1000 * errors.before[metric], 1000 * errors.after[metric]
    change = _describe_change(ratio)
    return f"Force error (MAE) on the validation data: {format_error(before)} → {format_error(after)} meV/Å, {change}."


def checkpoint_path(trainer: Trainer) -> str:
    """Returns the path of the best checkpoint, else of the last one; empty if there is none."""
    callback = trainer.checkpoint_callback
    return str(getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", ""))


def _logged(trainer: Trainer, module: LightningModule, prefix: str) -> dict[str, float]:
    """Returns what was logged under a prefix, without values that are NaN and quantities without a weight."""
    weights: Any = getattr(module, "weights", {})
    values = {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }
    is_used = {q.metric: not isinstance(weights, Mapping) or weights.get(q.name, 1.0) > 0 for q in QUANTITIES}
    return {name: value for name, value in values.items() if is_used.get(name, True) and not math.isnan(value)}


def _ratio(errors: Errors, metric: str) -> float:
    before, after = errors.before.get(metric, math.nan), errors.after.get(metric, math.nan)
    return before / after if after > 0 else math.nan


def format_error(value: float) -> str:
    """Formats with three significant digits; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _describe_change(ratio: float) -> str:
    """Describes the ratio of an error before to the error after, in the markup of rich."""
    if math.isnan(ratio) or ratio >= 1:
        return "–" if math.isnan(ratio) else f"{format_error(ratio)}× better"
    return f"[bold red]{format_error(1 / ratio)}× worse[/]"
