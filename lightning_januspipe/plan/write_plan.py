"""Writes a plan to a folder: pictures, a trace, all numbers, and every schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_januspipe.plan.compare import SchedulePlan
from lightning_januspipe.plan.measure import Measured
from lightning_januspipe.schedule import draw
from lightning_januspipe.schedule.chrome_trace import write_chrome_trace
from lightning_januspipe.schedule.figures import Panel
from lightning_januspipe.schedule.step_report import Report


def write_plan(
    plan: SchedulePlan, folder: Path, suffix: str, about: dict[str, Any], measured: Sequence[Measured]
) -> list[Path]:
    """Writes the files of a plan.

    Args:
        plan: The predictions and the chosen schedule.
        folder: The folder, which is made if it does not exist.
        suffix: ``svg`` or ``png``.
        about: Further entries of ``plan.json``.
        measured: The cuts of the potential, for ``plan.json``; none where costs were given.

    Returns:
        The paths, the most interesting first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(row.name, row.schedule, row.report) for row in plan.rows]
    title = f"{plan.options.num_ranks} ranks, {plan.options.num_microbatches} micro-batches"
    paths = [folder / f"gantt.{suffix}"]
    draw.gantt([_milliseconds(row) for row in rows], paths[0], unit="ms", title=title)
    if all(report.memory for _, _, report in rows):
        paths.append(folder / f"memory.{suffix}")
        limit = plan.options.memory_limit
        draw.memory([_milliseconds(row) for row in rows], paths[-1], unit="ms", title=title, limit=limit)
    paths.append(folder / "trace.json")
    write_chrome_trace(rows, paths[-1])
    paths.append(folder / "plan.json")
    content = {
        **about,
        **plan.to_dict(),
        "stages": {f"{m.num_stages}{m.on_ranks}": stages_dict(m) for m in measured},
        "cuts": {f"{m.num_stages}{m.on_ranks}": m.report.to_dict() for m in measured},
    }
    paths[-1].write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for row in plan.rows:
        paths.append(folder / f"schedule-{row.name}.csv")
        paths[-1].write_text(row.schedule.to_csv(), encoding="utf-8")
    return paths


def stages_dict(measured: Measured) -> list[dict[str, Any]]:
    """Returns the costs and boundaries of every stage of a cut, in seconds and bytes."""
    found = []
    for stage, (costs, deferred, memory, later) in enumerate(
        zip(measured.costs, measured.deferred, measured.memory, measured.deferred_memory, strict=True)
    ):
        boundary = measured.boundary(stage) if stage < measured.num_stages - 1 else []
        found.append(
            {
                "seconds": {name: getattr(costs, name) for name in ("fe", "ff", "bf", "be")},
                "seconds_deferred": {n: getattr(deferred, n) for n in ("fe", "ff", "bf", "be", "wf", "we")},
                "memory": {name: getattr(memory, name) for name in ("energy", "force", "kept")},
                "memory_deferred": {name: getattr(later, name) for name in ("energy", "force", "kept")},
                "boundary": [
                    {"name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                    for name, spec in boundary
                ],
                "boundary_bytes": measured.boundary_bytes(stage) if boundary else 0,
                "num_operations": measured.potential.num_operations[stage],
                "num_recomputed": measured.report.repeated[stage].again if measured.report.repeated else 0,
            }
        )
    return found


def _milliseconds(row: Panel) -> Panel:
    label, schedule, report = row
    return label, schedule, _scaled(report, 1e3)


def _scaled(report: Report, factor: float) -> Report:
    """Returns a report in another unit of time."""
    return Report(
        makespan=factor * report.makespan,
        ideal=factor * report.ideal,
        peak_live=report.peak_live,
        start={action: factor * time for action, time in report.start.items()},
        end={action: factor * time for action, time in report.end.items()},
        busy=tuple(factor * time for time in report.busy),
        memory=tuple(tuple((factor * time, held) for time, held in curve) for curve in report.memory),
    )
