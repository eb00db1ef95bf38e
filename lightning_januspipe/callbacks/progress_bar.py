"""Shows a progress bar of one line of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, TimeRemainingColumn
from typing_extensions import override

from lightning_januspipe.callbacks.lightning_classes import LightningModule, RichProgressBar, Trainer

SHORT_NAMES = {"train_loss": "loss", "val_loss": "val", "atoms_per_s": "atoms/s"}
"""The logged values that the bar shows, and what it calls them."""

_BAR_WIDTH = 8


class NarrowProgressBar(RichProgressBar):
    """Shows the losses, atoms per second and the remaining time of an epoch in one line of 80 columns.

    Lightning's own bar shows everything that is logged with ``prog_bar=True``, and breaks it over several lines.

    .. code-block:: yaml

        trainer:
          callbacks+:
            - class_path: lightning_januspipe.callbacks.NarrowProgressBar
    """

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Returns the columns of the bar: what runs, how far it is, and the time that is left."""
        columns = super().configure_columns(trainer)
        description, bar, batches = columns[:3]
        if isinstance(bar, BarColumn):
            bar.bar_width = _BAR_WIDTH
        return [description, bar, batches, TimeRemainingColumn(compact=True)]

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Returns the values that the bar shows, under short names."""
        found = super().get_metrics(trainer, pl_module)
        shown = {short: found[name] for name, short in SHORT_NAMES.items() if name in found}
        return {name: _short(value) if isinstance(value, (int, float)) else value for name, value in shown.items()}


def _short(value: float) -> str:
    """Formats with three significant digits, or as a whole number."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
