"""Draws predictions against labels, the errors of both, and errors over the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_januspipe import keys
from lightning_januspipe.callbacks.error_report import format_error
from lightning_januspipe.callbacks.records import Floats
from lightning_januspipe.schedule import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    keys.ENERGY: ("energy", "eV/atom", "structures"),
    keys.FORCES: ("force components", "eV/Å", "components"),
    keys.STRESS: ("stress components", "eV/Å³", "components"),
}
_BLUE, _ORANGE, _GREY, _INK = "#0868AC", "#C8500A", "#888888", "#222222"
_MOST_POINTS = 400  # each of so many points is drawn; the density of more
_BINS = 120
_SHOWN = 99.0  # percent of the errors that the histogram shows
_FEW_ERRORS = 500  # fewer errors than this are all shown


def draw_parity(quantity: str, given: Floats, predicted: Floats, path: Path, title: str, note: str = "") -> None:
    """Draws predictions against labels as a density, beside a histogram of the errors.

    Args:
        quantity: ``energy``, ``forces`` or ``stress``.
        given: (n,) labels in eV/atom, eV/Å or eV/Å³.
        predicted: (n,) predictions.
        path: File to write, ``.png`` or ``.svg``.
        title: Title of the picture.
        note: What the values are relative to, for the labels of the axes.
    """
    from matplotlib.figure import Figure

    name, unit, what = _LABELS[quantity]
    with figures.style():
        figure = Figure(figsize=(7.4, 3.6), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
        _draw_density(figure, left, given, predicted)
        left.set_xlabel(f"given {name}{note} ({unit})")
        left.set_ylabel(f"predicted{note} ({unit})")
        errors = 1000 * (predicted - given)
        spread = ((given - given.mean()) ** 2).sum()
        lines = [
            ("MAE", f"{format_error(float(np.abs(errors).mean()))} m{unit}"),
            ("RMSE", f"{format_error(float(np.sqrt((errors**2).mean())))} m{unit}"),
            *([("R²", _explained(1 - ((predicted - given) ** 2).sum() / spread))] if spread > 0 else []),
            (f"{len(given):,} {what}", ""),
        ]
        for line, (label, value) in enumerate(lines):
            for x, text in ((0.04, label), (0.2, value)):
                left.text(x, 0.95 - 0.06 * line, text, transform=left.transAxes, fontsize=8.5, color=_INK)
        _draw_errors(right, errors, f"m{unit}", what)
        figures.save(figure, path)


def _explained(share: float) -> str:
    """Returns R² as text; predictions that are worse than the mean of the labels have a negative one of any size."""
    return f"{share:.4f}" if share >= 0 else "below 0"


def _draw_density(figure: Any, axes: Axes, given: Floats, predicted: Floats) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    both = np.concatenate([given, predicted])
    low, high = float(both.min()), float(both.max())
    margin = 0.04 * (high - low) or 1.0
    limits = low - margin, high + margin
    axes.plot(limits, limits, color=_GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    if len(given) <= _MOST_POINTS:
        axes.scatter(given, predicted, s=14, color=_BLUE, alpha=0.6, linewidths=0, zorder=2)
    else:
        colours = LinearSegmentedColormap.from_list("density", ["#9FD3F2", "#0868AC", "#042A4F"])
        counts, x, y = np.histogram2d(given, predicted, bins=_BINS, range=(limits, limits))
        shown = np.ma.masked_equal(counts.T, 0)
        mesh = axes.pcolormesh(x, y, shown, cmap=colours, norm=LogNorm(1, max(2.0, counts.max())), rasterized=True)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05)
        ticks = [t * 10**k for k in range(12) for t in (1, 2, 5) if t * 10**k <= max(2.0, counts.max())]
        bar.set_ticks(ticks if len(ticks) <= 5 else [t for t in ticks if str(t).startswith("1")])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        bar.ax.minorticks_off()
        bar.ax.set_title("count", fontsize=8)
        bar.outline.set_visible(False)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))


def _draw_errors(axes: Axes, errors: Floats, unit: str, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    edge = float(np.percentile(np.abs(errors), 100.0 if len(errors) < _FEW_ERRORS else _SHOWN)) or 1e-9
    beyond = float((np.abs(errors) > edge).mean())
    width = 2 * float(np.subtract(*np.percentile(errors, [75, 25]))) / len(errors) ** (1 / 3)  # Freedman and Diaconis
    bins = int(np.clip(2 * edge / max(width, edge / 40), 12, 80))
    axes.hist(errors, bins=bins, range=(-edge, edge), color=_BLUE, alpha=0.85)
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    mean = float(errors.mean())
    axes.axvline(mean, color=_ORANGE, linewidth=1.0)
    axes.set_xlim(-1.05 * edge, 1.05 * edge)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    is_zero = abs(mean) < 1e-3 * float(np.abs(errors).mean())  # as of forces, whose sum is zero
    text = "mean 0" if is_zero else f"mean {'−' if mean < 0 else ''}{format_error(abs(mean))} {unit}"
    axes.set_title(text, loc="left", fontsize=8.5, color=_ORANGE)
    if beyond:
        axes.set_title(f"{100 * beyond:.1f} % outside", loc="right", fontsize=8.5, color=_GREY)
    axes.set_xlabel(f"predicted − given ({unit})")
    axes.set_ylabel(what)


def draw_learning_curves(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draws the errors of training and validation data, and the learning rate, over the epochs.

    Args:
        history: For each epoch, its index as ``epoch`` and the logged values, as ``val_forces_mae`` in eV/Å; ``lr`` is
            the learning rate. What is missing or NaN is left out.
        path: File to write, ``.png`` or ``.svg``.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    units = {keys.ENERGY: "meV/atom", keys.FORCES: "meV/Å", keys.STRESS: "meV/Å³"}
    panels = [(f"{name}\nMAE ({unit})", f"{name}_mae", 1000.0) for name, unit in units.items()]
    panels = [("validation\nloss", "loss", 1.0), *panels]  # of the training data only the last batch is logged
    shown = [panel for panel in panels if any(_known(history, f"val_{panel[1]}")[0])]
    rates = _known(history, "lr")
    heights = [1.0] * len(shown) + [0.6] * (len(set(rates[1])) > 1)
    with figures.style():
        figure = Figure(figsize=(7.4, 0.6 + 1.55 * sum(heights)), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        found = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        for axes, (label, name, factor) in zip(found, shown, strict=False):
            stages = (("train", "training", _GREY), ("val", "validation", _BLUE))[name == "loss" :]
            for stage, legend, colour in stages:
                epochs, values = _known(history, f"{stage}_{name}")
                marker = "." if len(epochs) < 60 else ""
                axes.plot(epochs, factor * np.array(values), color=colour, marker=marker, linewidth=1.2, label=legend)
            axes.set_ylabel(label)
        if len(heights) > len(shown):
            found[-1].plot(*rates, color=_ORANGE, linewidth=1.2)
            found[-1].set_ylabel("learning\nrate")
        for axes in found:
            axes.set_yscale("log")
            lowest, highest = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 100 * lowest else (1.0,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y", color="#E4E4E4", linewidth=0.6)
        figure.legend(*_legend(found), loc="outside upper right", ncols=2)
        figure.align_ylabels(found)
        found[-1].set_xlabel("epoch")
        found[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.save(figure, path)


def _legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Returns a handle for each label of all axes, training data before validation data."""
    handles: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = sorted(handles)
    return [handles[name] for name in names], names


def _known(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Returns the epochs that have a positive value, and the values."""
    pairs = [(epoch["epoch"], epoch[name]) for epoch in history if epoch.get(name, float("nan")) > 0]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]
