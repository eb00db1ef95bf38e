"""Draws the picture of ``PipelineMonitor``: the last recorded step, and curves over all recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_januspipe.schedule import draw, figures

_WIDTH, _HEIGHT = 8.0, 1.5  # inches: width of the picture, height of a panel
_LEFT, _RIGHT, _BOTTOM, _GAP = 0.8, 0.8, 0.5, 0.25
_COLOURS = ("#0868AC", "#C8500A")


@dataclass(frozen=True)
class Curve:
    """Holds one quantity over the course of training.

    Attributes:
        label: Name with its unit.
        batches: Indices of training batches.
        values: The values at these batches.
    """

    label: str
    batches: Sequence[int]
    values: Sequence[float]


def draw_run(rows: Sequence[figures.Panel], panels: Sequence[Sequence[Curve]], path: Path, title: str) -> None:
    """Draws a recorded step above curves with a common axis of batches.

    Args:
        rows: Label, schedule and report of each pipeline; may be empty.
        panels: One or two curves for each panel; the second curve has its axis on the right.
        path: The file, ``.png`` or ``.svg``.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    below = len(panels) * (_HEIGHT + _GAP) + _BOTTOM
    if rows:
        figure = draw.gantt_figure(rows, unit="s", title=title, below=below)
    else:
        figure = Figure(figsize=(_WIDTH, below + 0.3), dpi=150)
        figure.text(_LEFT / _WIDTH, 0.99, title, fontsize=12, fontweight="bold", va="top")
    width, height = figure.get_size_inches()
    with figures.style():
        for index, curves in enumerate(panels):
            bottom = _BOTTOM + (len(panels) - 1 - index) * (_HEIGHT + _GAP)
            box = (_LEFT / width, bottom / height, 1 - (_LEFT + _RIGHT) / width, _HEIGHT / height)
            first = figure.add_axes(box)
            for place, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=False)):
                axes = first.twinx() if place else first
                name = f"curve-{curve.label}"
                axes.plot(curve.batches, curve.values, color=colour, marker=".", linewidth=1.0, gid=name)
                axes.set_ylim(0.0, 1.1 * max([*curve.values, 1e-9]))
                axes.set_ylabel(curve.label, color=colour)
                axes.spines["right"].set_visible(bool(place))
            first.tick_params(axis="x", labelbottom=index == len(panels) - 1)
        first.set_xlabel("training batch")
    figures.save(figure, path)
