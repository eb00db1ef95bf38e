"""The tables of ``januspipe plan``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_januspipe.plan.measure import Measured
from lightning_januspipe.plan.rows import Plan, ScheduleRow, format_bytes

_WIDTH = 120
_UNEVEN = 1.3  # largest stage over an even one


def make_console() -> Console:
    """Standard output: no colours and 120 columns where it is not a terminal."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(file=sys.stdout, width=_WIDTH, color_system=None, highlight=False)


def stage_table(measured: Measured, num_ranks: int) -> Table:
    """Times, share of the work and memory of each stage."""
    per_rank = measured.num_stages // num_ranks
    title = f"{measured.num_stages} stages"
    if per_rank > 1:
        title += f", {per_rank} on each rank"
    table = _table(
        title,
        ("stage", "work"),
        ("FE", "FF", "BF", "BE"),
        ("BF'", "BE'", "WF", "WE"),
        ("energy", "force", "kept"),
        ("sends", "again"),
    )
    total = sum(costs.total for costs in measured.costs)
    rows = zip(measured.costs, measured.deferred, measured.memory, strict=True)
    for stage, (costs, deferred, memory) in enumerate(rows):
        is_last = stage == measured.num_stages - 1
        table.add_row(
            str(stage),
            f"{100 * costs.total / total:.0f} %",
            *(_milliseconds(time) for time in (costs.fe, costs.ff, costs.bf, costs.be)),
            *(_milliseconds(time) for time in (deferred.bf, deferred.be, deferred.wf, deferred.we)),
            *(format_bytes(held) for held in (memory.energy, memory.force, memory.kept)),
            "–" if is_last else format_bytes(measured.boundary_bytes(stage)),
            str(len(measured.potential.cut.replicated[stage])),
        )
    whole = measured.costs
    sums = [sum(getattr(costs, name) for costs in whole) for name in ("fe", "ff", "bf", "be")]
    late = [sum(getattr(costs, name) for costs in measured.deferred) for name in ("bf", "be", "wf", "we")]
    held = [sum(getattr(memory, name) for memory in measured.memory) for name in ("energy", "force", "kept")]
    table.add_section()
    table.add_row("all", "100 %", *map(_milliseconds, [*sums, *late]), *map(format_bytes, held), "", "")
    return table


def boundary_lines(measured: Measured, num_atoms: int, batch_symbol: str | None) -> list[str]:
    """What every stage passes on to the next: bytes, for each atom too where all of it is per atom, and the tensors.

    Args:
        measured: the cut potential.
        num_atoms: atoms of the micro-batch.
        batch_symbol: the size symbol that is the number of atoms, written as N.
    """
    lines = []
    for stage in range(measured.num_stages - 1):
        boundary = measured.boundary(stage)
        size = measured.boundary_bytes(stage)
        per_atom = ""
        if batch_symbol is not None and num_atoms and all(spec.shape[:1] == (batch_symbol,) for _, spec in boundary):
            per_atom = f" ({size / num_atoms:.0f} B per atom)"
        tensors = ", ".join(
            f"{name} ({', '.join('N' if s == batch_symbol else str(s) for s in spec.shape)}) "
            f"{str(spec.dtype).removeprefix('torch.')}"
            for name, spec in boundary
        )
        lines.append(f"stage {stage} → {stage + 1}: {format_bytes(size)}{per_atom}: {tensors}")
    return lines


def schedule_table(plan: Plan) -> Table:
    """One row for every schedule; the choice is marked."""
    has_data, has_memory = plan.structures is not None, any(row.report.memory for row in plan.rows)
    has_bytes = any(row.message_bytes for row in plan.rows)
    rate = ("struct/s", "atoms/s") if has_data and plan.atoms else ("struct/s",) if has_data else ("µbatch/s",)
    table = _table(
        f"{plan.options.num_ranks} ranks, {plan.options.num_microbatches} micro-batches",
        ("", "schedule"),
        ("stages", "live", "step ms", "/ideal", "bound", "gap", "bubble", *rate),
        (("peak/rank",) if has_memory else ()) + (("sent",) if has_bytes else ("messages",)) + ("speed",),
    )
    table.columns[1].justify = "left"
    for row in plan.rows:
        table.add_row(*_cells(plan, row, has_memory, has_bytes), style="bold" if row is plan.choice else None)
    return table


def _cells(plan: Plan, row: ScheduleRow, has_memory: bool, has_bytes: bool) -> list[str]:
    cells = ["→" if row is plan.choice else "", row.name, str(row.schedule.num_stages), str(row.num_live)]
    cells += [_milliseconds(row.step_time), f"{row.over_ideal:.3f}"]
    cells += (
        ["–", "–"]
        if row.bound is None or row.gap is None
        else [
            _milliseconds(row.bound),
            f"{100 * row.gap:.1f} %",
        ]
    )
    cells.append(f"{100 * row.report.bubble_fraction:.1f} %")
    if plan.structures is None:
        cells.append(_three_digits(plan.per_second(1, row)))
    else:
        cells.append(_three_digits(plan.per_second(plan.structures, row)))
        if plan.atoms:
            cells.append(_three_digits(plan.per_second(plan.atoms, row)))
    if has_memory:
        peak = row.peak_memory
        cells.append("–" if peak is None else format_bytes(peak) + ("" if row.fits else " !"))
    cells.append(format_bytes(row.message_bytes) if has_bytes else str(row.num_messages))
    speed = plan.speed(row)
    cells.append("–" if speed is None else f"{speed:.2f}")
    return cells


def notes(plan: Plan) -> list[str]:
    """What does not fit, and what could not be built."""
    limit, ranks = plan.options.memory_limit, plan.options.num_ranks
    lines = []
    if plan.busiest * ranks > _UNEVEN:
        lines.append(
            f"! The stages are uneven: the largest has {100 * plan.busiest:.0f} % of the work, an even one would have "
            f"{100 / ranks:.0f} %. With one stage on each rank, {ranks} ranks are at best {1 / plan.busiest:.1f} times "
            "as fast as one."
        )
    lines += [
        f"! {row.name} does not fit in {format_bytes(limit or 0)} per rank: it needs {format_bytes(row.needed or 0)}"
        for row in plan.rows
        if not row.fits
    ]
    return [*lines, *(f"! {name}: {reason}" for name, reason in plan.failed.items())]


STAGE_LEGEND = (
    "Times in ms. BF', BE', WF, WE: with weight gradients deferred. energy, force, kept: bytes held per micro-batch "
    "from FE to BE, from FF to BF, from BF to BE. again: operations computed again instead of being sent."
)


def schedule_legend(plan: Plan) -> str:
    """What the columns of :func:`schedule_table` mean."""
    text = (
        "live: most micro-batches that a rank holds. /ideal: step over the work of the busiest rank. bound: no folded "
        "schedule of these stages is faster. bubble: idle share of the busiest rank."
    )
    if any(row.report.memory for row in plan.rows):
        text += " peak/rank: saved tensors."
    return text + " speed: against 1f1b-2nd. Loading of data and the optimizer are not counted."


def _table(title: str, *groups: Sequence[str]) -> Table:
    """A narrow table of numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for group in groups:
        for name in group:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _milliseconds(seconds: float) -> str:
    return _three_digits(1e3 * seconds)


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"
