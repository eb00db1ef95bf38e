"""Lays out figures: panels below each other with one time axis, in the same look everywhere, written to files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lightning_januspipe.schedule.actions import Schedule
from lightning_januspipe.schedule.step_report import Report

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel: TypeAlias = tuple[str, Schedule, Report]
"""One panel of a picture: its label, the schedule, and the schedule's times."""

SUFFIXES = (".png", ".svg")
"""Endings of the files that can be written."""

POINTS = 72.0  # per inch
_DPI = 150
# Sizes in inches: what surrounds the panels, and what a panel takes beside its rows.
LEFT, RIGHT, _BOTTOM, _TOP = 0.6, 0.15, 0.5, 0.08
_TITLE, _LEGEND_LINE, _PANEL_TITLE, _GAP = 0.3, 0.2, 0.27, 0.12


def check_panels(rows: Sequence[Panel]) -> None:
    """Checks that there are rows, and that the report of each has the times of its schedule's actions.

    Raises:
        ValueError: There is no row, or a report lacks the time of an action.
    """
    if not rows:
        raise ValueError("There is nothing to draw: rows is empty, expected (label, schedule, report) at least once.")
    for label, schedule, report in rows:
        if not report.start:
            raise ValueError(f"The report of {label!r} is empty, expected the times of the schedule's actions.")
        for order in schedule.actions:
            for action in order:
                if action not in report.start or action not in report.end:
                    raise ValueError(
                        f"The report of {label!r} has no time for {action}, expected one for every action of its "
                        f"schedule {schedule.name!r}: pass each schedule with its own report."
                    )


def first_start(report: Report) -> float:
    """Returns the time at which the first action starts; pictures count from there."""
    return min(report.start.values())


def last_time(rows: Sequence[Panel]) -> float:
    """Returns the end of the time axis."""
    return 1.01 * max(report.makespan for _, _, report in rows)


def points_per_unit(axes: Axes) -> float:
    """Returns the points on paper of one unit of time; it is called after the time axis is set."""
    first, last = axes.get_xlim()
    return float(axes.bbox.width / _DPI * POINTS / (last - first))


def make_panels(
    width: float,
    heights: Sequence[float],
    legend: list[Artist],
    entry_width: float,
    rows: Sequence[Panel],
    unit: str,
    title: str,
    below: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with a title, a legend, and panels of the given heights below each other; sizes in inches."""
    from matplotlib.figure import Figure

    columns = min(len(legend), max(1, int((width - LEFT - RIGHT) / entry_width)))
    head = _TOP + (_TITLE if title else 0.0) + _LEGEND_LINE * math.ceil(len(legend) / columns) + 0.04
    height = head + sum(heights) + len(heights) * (_PANEL_TITLE + _GAP) + _BOTTOM + below
    figure = Figure(figsize=(width, height), dpi=_DPI)
    left, top = LEFT / width, 1.0 - _TOP / height
    if title:
        figure.text(left, top, title, fontsize=12, fontweight="bold", va="top")
        top -= _TITLE / height
    figure.legend(
        handles=legend, loc="upper left", bbox_to_anchor=(left, top), ncols=columns, borderaxespad=0.0, borderpad=0.0
    )
    last = last_time(rows)
    panels: list[Axes] = []
    bottom = height - head
    for panel_height in heights:
        bottom -= _PANEL_TITLE + panel_height
        box = (left, bottom / height, 1.0 - (LEFT + RIGHT) / width, panel_height / height)
        axes = figure.add_axes(box)
        axes.set_xlim(0.0, last)
        axes.tick_params(axis="x", labelbottom=len(panels) == len(heights) - 1)
        panels.append(axes)
        bottom -= _GAP
    panels[-1].set_xlabel(f"time ({unit})" if unit else "time")
    return figure, panels


@contextmanager
def style() -> Iterator[None]:
    """Gives pictures the same look on every machine, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "lightning_januspipe",
                "font.size": 9.0,
                "axes.titlesize": 9.5,
                "axes.titlepad": 4.0,
                "axes.edgecolor": "#888888",
                "axes.linewidth": 0.6,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "legend.handlelength": 1.4,
                "legend.columnspacing": 1.4,
            }
        )
        yield


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure to a file.

    Raises:
        ValueError: The path ends neither in ``.png`` nor in ``.svg``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"Cannot draw {os.fspath(path)!r}: expected a file that ends in {' or '.join(SUFFIXES)}.")
    # Without dates and versions a picture changes only with what it shows.
    unset = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}[suffix]
    with style():
        figure.savefig(path, format=suffix.removeprefix("."), metadata=unset)
