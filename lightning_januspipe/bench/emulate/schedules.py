"""Runs ``januspipe bench emulate``: all schedules on emulated devices, for a table and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from lightning_januspipe.bench.emulate.emulated_mesh import device_pool
from lightning_januspipe.bench.emulate.run import EmulatedRun, emulate
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.plan.compare import BASELINE
from lightning_januspipe.schedule import PhaseCosts, Schedule, build_schedule
from lightning_januspipe.schedule.build_schedule import GENERATORS
from lightning_januspipe.schedule.chrome_trace import write_chrome_trace
from lightning_januspipe.schedule.costs import action_times
from lightning_januspipe.schedule.draw import gantt
from lightning_januspipe.schedule.figures import Panel
from lightning_januspipe.testing import RankPool

COSTS = PhaseCosts(1.0, 1.35, 1.9, 0.7, 0.8, 0.9)
"""Used where none are given: ratios measured on the reference potential, as docs/benchmarks.md tells."""

_COSTS = ",".join(f"{getattr(COSTS, field.name):g}" for field in fields(COSTS))

_COLUMNS = (
    "schedule",
    "simulated (s)",
    "with messages (s)",
    "emulated, median (s)",
    "range (s)",
    "against simulated",
    "against that with messages",
    "makespan / ideal",
    f"speed against {BASELINE}",
    "peak live",
)


def compare_emulated(
    names: Sequence[str],
    num_ranks: int,
    num_microbatches: int,
    costs: PhaseCosts = COSTS,
    *,
    seconds_per_unit: float | None = None,
    repeats: int = 3,
    message_bytes: int = 1024,
    pool: RankPool | None = None,
    report: Callable[[str], None] = print,
) -> list[EmulatedRun]:
    """Runs schedules one after another on the same emulated devices.

    Args:
        names: Names of schedules.
        num_ranks: Number of ranks, each a process.
        num_microbatches: Micro-batches of a step.
        costs: Times of one rank's share for one micro-batch.
        seconds_per_unit: Seconds in one unit of the costs; None chooses it by :func:`suitable_unit`.
        repeats: Steps of each schedule.
        message_bytes: Bytes of the boundary between two stages.
        pool: The processes; None starts some for this call.
        report: Gets a line after each schedule.
    """
    schedules = [build_schedule(name, num_ranks, num_microbatches, costs) for name in names]
    unit = suitable_unit(schedules, costs) if seconds_per_unit is None else seconds_per_unit
    runs = []
    with nullcontext(pool) if pool is not None else device_pool(num_ranks) as ranks:
        for schedule in schedules:
            run = emulate(
                schedule, costs, seconds_per_unit=unit, repeats=repeats, message_bytes=message_bytes, pool=ranks
            )
            runs.append(run)
            report(f"{schedule.name}: {run.makespan:.3f} s, simulated {run.with_messages.makespan:.3f} s")
    return runs


def suitable_unit(schedules: Sequence[Schedule], costs: PhaseCosts, mesh: MeshShape | None = None) -> float:
    """Returns seconds per unit of the costs with which the shortest action is long beside the runtime's own work.

    The shortest action takes 8 ms on up to 8 ranks; more ranks share the same cores, so it grows to 12 ms on 32.
    Pipelines side by side run the same actions at the same times, and graph ranks exchange more: there it takes 0.5 ms
    for each rank and each graph rank that it meets, but at least 8 ms.

    Args:
        schedules: The schedules that will run.
        costs: Times of one rank's share for one micro-batch.
        mesh: The mesh that the pipelines run in; None for one pipeline at a time.
    """
    num_ranks = max(schedule.num_ranks for schedule in schedules)
    shortest = min(
        duration
        for schedule in schedules
        for phase in schedule.phases
        for stage in range(schedule.num_stages)
        if (duration := action_times(schedule, costs)(phase, stage)) > 0
    )
    if mesh is not None:
        return max(8e-3, 0.5e-3 * mesh.size * mesh.graph) / shortest
    return (8e-3 + max(0, num_ranks - 8) * 4e-3 / 24) / shortest


def emulation_table(runs: Sequence[EmulatedRun]) -> str:
    """Returns a Markdown table of runs on the same devices, and the times of the runtime itself."""
    baseline = next((run for run in runs if run.schedule.name == BASELINE), None)
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for run in runs:
        cells = (
            run.schedule.name,
            f"{run.simulated.makespan:.3f}",
            f"{run.with_messages.makespan:.3f}",
            f"{run.makespan:.3f}",
            f"{min(run.makespans):.3f} to {max(run.makespans):.3f}",
            f"{run.makespan / run.simulated.makespan - 1:+.1%}",
            f"{run.error:+.1%}",
            f"{run.makespan / run.simulated.ideal:.3f}",
            f"{baseline.makespan / run.makespan:.2f}" if baseline is not None else "",
            f"{max(run.report.peak_live)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _runtime(runs)])


def _runtime(runs: Sequence[EmulatedRun]) -> str:
    def range_of(values: Sequence[float]) -> str:
        return f"{1e3 * min(values):.2f} to {1e3 * max(values):.2f} ms"

    where = "before other programs" if all(run.urgent for run in runs) else "among other programs"
    return (
        f"Medians of each schedule: a message took {range_of([run.latency for run in runs])}; an action that waited "
        f"for another rank's began {range_of([run.handover for run in runs])} after that had ended, one that waited "
        f"for nothing {range_of([run.turnaround for run in runs])} after the one before it; phases took "
        f"{range_of([run.oversleep for run in runs])} longer than asked for; the busiest process used "
        f"{max(run.cpu for run in runs):.0%} of a core. Ranks ran {where} on the machine."
    )


def pictures(runs: Sequence[EmulatedRun], folder: Path) -> None:
    """Writes for every run a Gantt chart of its simulation and of the real step, and a trace of both.

    Args:
        runs: The runs to draw.
        folder: The folder for the files ``<schedule>.png`` and ``<schedule>.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        schedule = run.schedule
        rows: list[Panel] = [
            ("simulated", schedule, run.with_messages),
            ("emulated", schedule, run.report),
        ]
        title = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches"
        gantt(rows, folder / f"{schedule.name}.png", unit="s", title=title)
        write_chrome_trace(rows, folder / f"{schedule.name}.json")


def parse_costs(text: str) -> PhaseCosts:
    """Returns costs from numbers with commas between them: FE, FF, BF, BE, WF, WE.

    Raises:
        ValueError: There are not six numbers, or one of them is not a possible cost.
    """
    names = [f.name for f in fields(PhaseCosts)]
    parts = text.split(",")
    if len(parts) != len(names):
        raise ValueError(f"costs {text!r}: expected {len(names)} numbers with commas between them: {','.join(names)}")
    return PhaseCosts(*map(float, parts))


def emulate_schedules(
    ranks: int = 8,
    microbatches: int = 16,
    costs: str = _COSTS,
    schedules: str = "all",
    repeats: int = 3,
    seconds_per_unit: float | None = None,
    message_bytes: int = 1024,
    output: Path | None = None,
) -> str:
    """Runs schedules on emulated devices and compares the times with the simulated ones.

    Args:
        ranks: Ranks of the pipeline, one process each.
        microbatches: Micro-batches of a step.
        costs: Times of FE,FF,BF,BE,WF,WE.
        schedules: Names of schedules with commas between them, or all.
        repeats: Steps of each schedule.
        seconds_per_unit: Seconds in one unit of the costs; without it, so many that the runtime is small beside them.
        message_bytes: Bytes of the boundary between two stages.
        output: Folder for a Gantt chart (PNG) and a trace of every schedule.

    Returns:
        The table.

    Raises:
        ValueError: An argument is not possible.
    """
    runs = compare_emulated(
        list(GENERATORS) if schedules == "all" else schedules.split(","),
        ranks,
        microbatches,
        parse_costs(costs),
        seconds_per_unit=seconds_per_unit,
        repeats=repeats,
        message_bytes=message_bytes,
    )
    text = emulation_table(runs)
    if output is not None:
        pictures(runs, output)
        text += f"\n\nPictures and traces are in {output}."
    return text
