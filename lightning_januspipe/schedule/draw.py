"""Draws timed schedules: Gantt charts, and the memory that every rank holds over time.

Both take rows of (label, schedule, report), one for each panel. The report of `simulate` gives the predicted picture,
the report of a recorded step the real one. All panels have the same time axis, which begins at the first action of
each.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_januspipe.schedule.actions import Action, Phase, Schedule
from lightning_januspipe.schedule.costs import byte_unit, format_bytes
from lightning_januspipe.schedule.figures import (
    LEFT,
    POINTS,
    RIGHT,
    Panel,
    check_panels,
    first_start,
    last_time,
    make_panels,
    points_per_unit,
    save,
    style,
)
from lightning_januspipe.schedule.step_report import Report

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS: Mapping[Phase, str] = {
    Phase.FE: "#7CC4F0",
    Phase.FF: "#0868AC",
    Phase.BF: "#C8500A",
    Phase.BE: "#F2A01E",
    Phase.WF: "#EDBBA0",
    Phase.WE: "#FAE3A6",
    Phase.UNSHARD: "#1B7F5C",
    Phase.RESHARD: "#888888",
    Phase.REDUCE: "#7B3FA0",
}
"""Forward phases are blue, backward ones red and orange (after Okabe and Ito), and their weight gradients paler; what
changes sharded state is green, grey and purple."""

PHASE_NAMES: Mapping[Phase, str] = {
    Phase.FE: "FE forward energy",
    Phase.FF: "FF forward force",
    Phase.BF: "BF backward force",
    Phase.BE: "BE backward energy",
    Phase.WF: "WF weights of BF",
    Phase.WE: "WE weights of BE",
    Phase.UNSHARD: "parameters gathered",
    Phase.RESHARD: "parameters released",
    Phase.REDUCE: "gradients reduced",
}

_WHITE_NUMBERS = (Phase.FF, Phase.BF)
_BUBBLE_COLOUR = "#ECECEC"
_INK = "#222222"
_LIMIT_COLOUR = "#B00020"
_DASHES = (0, (4, 2))
_BOX_HEIGHT = 0.88  # of a rank's row
_BAR_HEIGHT = 0.16  # of a rank's row, under the boxes of its last stage
_BAR_COLOUR = "#00000090"
_STATE_HEIGHT = 0.2  # of a rank's row, above its boxes
_DIGIT_WIDTH = 0.64  # of the font size, in matplotlib's own font
_LEAST_FONT, _LARGEST_FONT = 5.0, 8.0  # points
_LEAST_WIDTH, _LARGEST_WIDTH = 8.0, 24.0


def gantt(
    rows: Sequence[Panel], path: str | os.PathLike[str], *, unit: str = "", title: str = "", one_axis: bool = True
) -> None:
    """Draws when each rank runs which action, one panel per row.

    A box is an action, in the colour of its phase and, where there is room, with the index of its micro-batch. Where a
    rank has several stages, the boxes of all but the first have a bar at the bottom, higher from stage to stage.
    Changes of sharded state, which run beside the work, are flat boxes over it. The light ground behind the boxes is a
    bubble, the dashed line the ideal time.

    Args:
        rows: Label, schedule and report of every panel, from top to bottom.
        path: File to write, ``.png`` or ``.svg``; the same rows give the same bytes.
        unit: Unit of the reports' times, for the labels.
        title: Title of the whole picture.
        one_axis: Whether all panels have the same time axis; otherwise each has one of its own length.

    Raises:
        ValueError: ``path`` ends otherwise, there is no row, or a report belongs to another schedule.
    """
    save(gantt_figure(rows, unit=unit, title=title, one_axis=one_axis), path)


def memory(
    rows: Sequence[Panel],
    path: str | os.PathLike[str],
    *,
    unit: str = "",
    title: str = "",
    limit: float | None = None,
) -> None:
    """Draws the bytes that every rank holds over time, one panel per row, with the same axes.

    Args:
        rows: Label, schedule and report of every panel, from top to bottom; the reports have a ``memory``.
        path: File to write, ``.png`` or ``.svg``; the same rows give the same bytes.
        unit: Unit of the reports' times, for the labels.
        title: Title of the whole picture.
        limit: Bytes that a rank may hold, drawn as a dashed line.

    Raises:
        ValueError: ``path`` ends otherwise, there is no row, a report belongs to another schedule or has no memory, or
            the limit is not a number > 0.
    """
    save(memory_figure(rows, unit=unit, title=title, limit=limit), path)


def gantt_figure(
    rows: Sequence[Panel], *, unit: str = "", title: str = "", below: float = 0.0, one_axis: bool = True
) -> Figure:
    """Returns the picture that `gantt` writes, with ``below`` inches left free under the panels.

    The boxes are one collection per phase, with the id ``panel<row>-<phase>``. Beside them there are
    ``panel<row>-bubbles`` and, where a rank has several stages, ``panel<row>-bars``.
    """
    check_panels(rows)
    most_ranks = max(schedule.num_ranks for _, schedule, _ in rows)
    row_height = min(max(0.13, 2.4 / most_ranks), 0.26)
    with style():
        heights = [schedule.num_ranks * row_height for _, schedule, _ in rows]
        width = _gantt_width(rows) if one_axis else max(_gantt_width([row]) for row in rows)
        figure, panels = make_panels(width, heights, _gantt_legend(rows), 1.5, rows, unit, title, below)
        for index, (axes, (label, schedule, report)) in enumerate(zip(panels, rows, strict=True)):
            if not one_axis:
                axes.set_xlim(0.0, last_time([(label, schedule, report)]))
                axes.tick_params(axis="x", labelbottom=True, pad=1.0)
            _set_titles(axes, label, _summary(report, unit))
            _draw_boxes(axes, schedule, report, f"panel{index}")
            _number_boxes(axes, schedule, report, row_height * _BOX_HEIGHT * POINTS)
            axes.axvline(report.ideal, color=_INK, linestyle=_DASHES, linewidth=1.0)
            axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
            axes.set_yticks(range(0, schedule.num_ranks, 1 if schedule.num_ranks <= 16 else 4))
            axes.set_ylabel("rank")
            axes.tick_params(axis="y", length=0)
    return figure


def memory_figure(rows: Sequence[Panel], *, unit: str = "", title: str = "", limit: float | None = None) -> Figure:
    """Returns the picture that `memory` writes; the line of each rank has the id ``panel<row>-rank<rank>``."""
    check_panels(rows)
    for label, _, report in rows:
        if not report.memory:
            raise ValueError(
                f"The report of {label!r} has no memory, expected the bytes that each rank holds over time: "
                "simulate the schedule with the memory of its phases."
            )
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit is {limit!r}, expected a number of bytes > 0, or None.")
    top = max(limit or 1.0, *(peak for _, _, report in rows for peak in report.peak_memory))
    bytes_per_unit, unit_of_bytes = byte_unit(top)
    most_ranks = max(schedule.num_ranks for _, schedule, _ in rows)
    with style():
        figure, panels = make_panels(10.0, [1.8] * len(rows), _memory_legend(most_ranks, limit), 1.0, rows, unit, title)
        for index, (axes, (label, _, report)) in enumerate(zip(panels, rows, strict=True)):
            _set_titles(axes, label, _peak(report, limit))
            origin = first_start(report)
            for rank, steps in enumerate(report.memory):
                if not steps:
                    continue
                times = [time - origin for time, _ in steps]
                held = [value / bytes_per_unit for _, value in steps]
                axes.plot(
                    [*times, max(report.makespan, times[-1])],
                    [*held, held[-1]],
                    drawstyle="steps-post",
                    color=_rank_colour(rank, most_ranks),
                    linewidth=1.1,
                    gid=f"panel{index}-rank{rank}",
                )
            if limit is not None:
                axes.axhline(limit / bytes_per_unit, color=_LIMIT_COLOUR, linestyle=_DASHES, linewidth=1.2)
            axes.set_ylim(0.0, 1.06 * top / bytes_per_unit)
            axes.set_ylabel(f"held ({unit_of_bytes})")
            axes.grid(axis="y", color=_BUBBLE_COLOUR, linewidth=0.6)
    return figure


def _set_titles(axes: Axes, label: str, numbers: str) -> None:
    axes.set_title(label, loc="left", fontweight="bold")
    axes.set_title(numbers, loc="right")


def _summary(report: Report, unit: str) -> str:
    makespan = f"{report.makespan:.4g} {unit}".rstrip()
    found = report.bubbles
    mean, worst = sum(found) / len(found), max(found)
    bubbles = f"{mean:.1%}" if worst - min(found) < 0.001 else f"{mean:.1%} mean, {worst:.1%} worst"
    return f"makespan {makespan} = {report.makespan / report.ideal:.3f} × ideal, bubbles {bubbles}"


def _peak(report: Report, limit: float | None) -> str:
    peak = max(report.peak_memory)
    excess = ", more than the limit" if limit is not None and peak > limit else ""
    return f"peak {format_bytes(peak)} on rank {report.peak_memory.index(peak)}{excess}"


def _chunks(schedule: Schedule) -> list[dict[int, int]]:
    """Returns for each rank the index of each of its stages among them."""
    stages = [sorted({action.stage for action in order}) for order in schedule.actions]
    return [{stage: chunk for chunk, stage in enumerate(of_rank)} for of_rank in stages]


def _box(start: float, end: float, rank: float, height: float = _BOX_HEIGHT) -> list[tuple[float, float]]:
    """Returns the corners of a box in a rank's row; all boxes of a row stand on one line, and ranks count downwards."""
    bottom = rank + _BOX_HEIGHT / 2
    return [(start, bottom), (start, bottom - height), (end, bottom - height), (end, bottom)]


def _draw_boxes(axes: Axes, schedule: Schedule, report: Report, panel: str) -> None:
    """Adds the ground of the bubbles, the boxes of all actions, and the bars of later stages."""
    from matplotlib.collections import PolyCollection

    origin, chunks = first_start(report), _chunks(schedule)
    boxes: dict[Phase, list[list[tuple[float, float]]]] = {phase: [] for phase in Phase if phase in schedule.phases}
    bars = []
    bar = _BAR_HEIGHT / max(1, max(map(len, chunks)) - 1)
    for rank, order in enumerate(schedule.actions):
        for action in order:
            start, end = report.start[action] - origin, report.end[action] - origin
            if action.changes_state:
                top = rank - _BOX_HEIGHT + _STATE_HEIGHT
                boxes[action.phase].append(_box(start, end, top, _STATE_HEIGHT))
                continue
            boxes[action.phase].append(_box(start, end, rank))
            if chunk := chunks[rank][action.stage]:
                bars.append(_box(start, end, rank, chunk * bar))
    # A white edge parts neighbours of one colour; among very narrow boxes it would cover them.
    width = points_per_unit(axes) * statistics.median(_lengths(report))
    edge = min(0.5, 0.06 * width)
    ground = [_box(0.0, report.makespan, rank) for rank in range(schedule.num_ranks)]
    collections = [PolyCollection(ground, facecolors=_BUBBLE_COLOUR, linewidths=0.0, gid=f"{panel}-bubbles")]
    for phase, of_phase in boxes.items():
        colour, name = PHASE_COLOURS[phase], f"{panel}-{phase.value}"
        collections.append(PolyCollection(of_phase, facecolors=colour, edgecolors="white", linewidths=edge, gid=name))
    if bars:
        collections.append(PolyCollection(bars, facecolors=_BAR_COLOUR, linewidths=0.0, gid=f"{panel}-bars"))
    for collection in collections:
        axes.add_collection(collection, autolim=False)


def _number_boxes(axes: Axes, schedule: Schedule, report: Report, height: float) -> None:
    """Writes the index of the micro-batch into each box, ``height`` points high, that has room for any index.

    Boxes that are too narrow get one index together if they follow each other with one phase of one micro-batch.
    """
    origin, scale = first_start(report), points_per_unit(axes)
    room = scale * _short_time(report)
    font = min(max(_LEAST_FONT, room / _number_width(schedule, 1.0)), _LARGEST_FONT, 0.8 * height)
    if font < _LEAST_FONT:
        return
    least = _number_width(schedule, font) / scale * (1.0 - 1e-9)
    raised = _BAR_HEIGHT / 2 if any(len(stages) > 1 for stages in _chunks(schedule)) else 0.0
    for rank, order in enumerate(schedule.actions):
        for run in _runs([action for action in order if not action.changes_state], report):
            spans = [(report.start[action], report.end[action]) for action in run]
            if any(end - start < least for start, end in spans):
                spans = [(spans[0][0], spans[-1][1])]
            for start, end in spans:
                if end - start >= least:
                    axes.text(
                        (start + end) / 2 - origin,
                        rank - raised,
                        str(run[0].microbatch),
                        fontsize=font,
                        color="white" if run[0].phase in _WHITE_NUMBERS else _INK,
                        ha="center",
                        va="center_baseline",
                    )


def _runs(order: Sequence[Action], report: Report) -> Iterator[list[Action]]:
    """Yields the actions that follow each other with one phase and micro-batch and without a pause."""
    run: list[Action] = []
    for action in order:
        if run:
            pause = report.start[action] - report.end[run[-1]]
            same = action.phase is run[-1].phase and action.microbatch == run[-1].microbatch
            if not same or pause > 1e-6 * report.makespan:
                yield run
                run = []
        run.append(action)
    if run:
        yield run


def _number_width(schedule: Schedule, font: float) -> float:
    """Returns the width in points of the longest index of a micro-batch, with a little room on its sides."""
    return (len(str(schedule.num_microbatches - 1)) * _DIGIT_WIDTH + 0.2) * font


def _short_time(report: Report) -> float:
    """Returns the time that four of five actions take at least."""
    times = sorted(_lengths(report))
    return times[len(times) // 5]


def _lengths(report: Report) -> list[float]:
    return [end - report.start[action] for action, end in report.end.items() if not action.changes_state]


def _gantt_width(rows: Sequence[Panel]) -> float:
    """Returns the width in inches at which most boxes have room for an index, within what fits on a screen."""
    last = last_time(rows)
    width = 0.0
    for _, schedule, report in rows:
        number = _number_width(schedule, 1.04 * _LEAST_FONT) / POINTS
        width = max(width, number * last / max(_short_time(report), 1e-3 * last))
    return min(max(_LEAST_WIDTH, LEFT + width + RIGHT), _LARGEST_WIDTH)


def _gantt_legend(rows: Sequence[Panel]) -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    phases = frozenset[Phase]().union(*(schedule.phases for _, schedule, _ in rows))
    several = any(len(stages) > 1 for _, schedule, _ in rows for stages in _chunks(schedule))
    entries: list[Artist] = [
        Patch(color=PHASE_COLOURS[phase], label=PHASE_NAMES[phase]) for phase in Phase if phase in phases
    ]
    if several:
        entries.append(Line2D([], [], color=_BAR_COLOUR, linewidth=2.0, label="bar: later stage"))
    entries.append(Patch(color=_BUBBLE_COLOUR, label="bubble"))
    entries.append(Line2D([], [], color=_INK, linestyle=_DASHES, linewidth=1.0, label="ideal time"))
    return entries


def _memory_legend(num_ranks: int, limit: float | None) -> list[Artist]:
    """Returns the entries of ranks, evenly spaced from the first to the last, eight at most."""
    from matplotlib.lines import Line2D

    shown = {round(place * (num_ranks - 1) / 7) for place in range(8)}
    entries: list[Artist] = [
        Line2D([], [], color=_rank_colour(rank, num_ranks), label=f"rank {rank}")
        for rank in range(num_ranks)
        if num_ranks <= 8 or rank in shown
    ]
    if limit is not None:
        label = f"limit {format_bytes(limit)}"
        entries.append(Line2D([], [], color=_LIMIT_COLOUR, linestyle=_DASHES, label=label))
    return entries


def _rank_colour(rank: int, num_ranks: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, opaque = colormaps["viridis"](0.9 * rank / max(1, num_ranks - 1))
    return float(red), float(green), float(blue), float(opaque)
