"""Makes the tables of ``januspipe plan``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_januspipe.plan.compare import SchedulePlan, ScheduleRow
from lightning_januspipe.plan.graph_share import GraphShare
from lightning_januspipe.plan.measure import Measured
from lightning_januspipe.plan.meshes import Meshes
from lightning_januspipe.runtime.state_share import LEVELS, state_share
from lightning_januspipe.schedule.costs import format_bytes

_WIDTH = 120
_SHARING = (2, 4, 8)
_UNEVEN = 1.3  # largest stage over an even one
_MOST_TENSORS, _MOST_PARAMETERS = 4, 3  # that are named in a line


def make_console() -> Console:
    """Returns standard output, without colours and with 120 columns where it is no terminal."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(file=sys.stdout, width=_WIDTH, color_system=None, highlight=False)


def stage_table(measured: Measured) -> Table:
    """Returns times, share of the work and memory of each stage."""
    table = _table(
        f"{measured.num_stages} stages{measured.on_ranks}",
        ("stage", "work"),
        ("FE", "FF", "BF", "BE"),
        ("BF'", "BE'", "WF", "WE"),
        ("energy", "force", "kept"),
        ("sends", "geom.", "again"),
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
            *_repeated(measured, stage),
        )
    whole = measured.costs
    sums = [sum(getattr(costs, name) for costs in whole) for name in ("fe", "ff", "bf", "be")]
    late = [sum(getattr(costs, name) for costs in measured.deferred) for name in ("bf", "be", "wf", "we")]
    held = [sum(getattr(memory, name) for memory in measured.memory) for name in ("energy", "force", "kept")]
    table.add_section()
    table.add_row("all", "100 %", *map(_milliseconds, [*sums, *late]), *map(format_bytes, held), "", "", "")
    return table


def activation_table(measured: Measured) -> Table:
    """Returns what each stage takes with each activation."""
    offloads = "offload" in measured.activations
    table = _table(
        f"What a micro-batch keeps between phases, {measured.num_stages} stages{measured.on_ranks}",
        ("stage", "activation"),
        ("phases", "energy", "force", "kept", "in all", *(["on the host"] if offloads else [])),
    )
    table.columns[1].justify = "left"
    for stage in range(measured.num_stages):
        for name, (plain, _) in measured.activations.items():
            memory = plain.memory[stage]
            on_host = plain.host_bytes[stage : stage + 1] if offloads else ()
            sizes = (memory.energy, memory.force, memory.kept, memory.total, *on_host)
            table.add_row(str(stage), name, _milliseconds(plain.costs[stage].total), *map(format_bytes, sizes))
        table.add_section()
    return table


ACTIVATION_LEGEND = (
    "phases: ms of all phases of a micro-batch; where they are compiled, as long as eager phases and what is computed "
    "again. in all: what counts for memory_limit. A run with memory_limit chooses for each rank by itself."
)


def _repeated(measured: Measured, stage: int) -> list[str]:
    """Returns the shares of a stage's FE that are geometry, and that are computed again instead of being sent."""
    if not measured.report.repeated:  # explicit stages
        return ["", ""]
    repeated = measured.report.repeated[stage]
    shares = (repeated.geometry_share, repeated.again_share)
    return ["–" if share is None else f"{100 * share:.0f} %" for share in shares]


def cut_lines(measured: Measured) -> list[str]:
    """Returns lines about the tensors that every stage passes on, and the parameters that several stages hold."""
    found = measured.report
    lines = []
    for stage, boundary in enumerate(found.boundaries):
        tensors = _listed([str(tensor) for tensor in boundary.tensors], _MOST_TENSORS)
        size = format_bytes(measured.boundary_bytes(stage))
        lines.append(f"stage {stage} → {stage + 1}: {boundary}, {size} here: {tensors}")
    for word, place in found.defined.items():
        lines.append(f"{word}s: the size of {place}")
    groups: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for parameter in found.shared:
        groups.setdefault((parameter.stages, parameter.reason), []).append(parameter.name)
    for (stages, reason), names in groups.items():
        numbers = ", ".join(map(str, stages))
        lines.append(f"on stages {numbers}, gradients summed ({reason}): {_listed(names, _MOST_PARAMETERS)}")
    return lines


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def schedule_table(plan: SchedulePlan) -> Table:
    """Returns one row for every schedule; the choice is marked, unless the measurement cannot tell it from others."""
    choice = None if plan.rivals else plan.choice
    has_data, has_memory = plan.structures is not None, any(row.report.memory for row in plan.rows)
    has_bytes = any(row.message_bytes for row in plan.rows)
    rate = ("struct/s", "atoms/s") if has_data and plan.atoms else ("struct/s",) if has_data else ("µbatch/s",)
    table = _table(
        f"{plan.options.num_ranks} ranks, {plan.options.num_microbatches} micro-batches",
        ("", "schedule", *(("keeps",) if any(row.activation for row in plan.rows) else ())),
        ("stages", "live", "step ms", "/ideal", "bound", "gap", "bubble", *rate),
        (("peak/rank",) if has_memory else ()) + (("sent",) if has_bytes else ("messages",)) + ("speed",),
    )
    table.columns[1].justify = "left"
    if any(row.activation for row in plan.rows):
        table.columns[2].justify = "left"
    for row in plan.rows:
        is_choice = row is choice
        table.add_row(*_cells(plan, row, has_memory, has_bytes, is_choice), style="bold" if is_choice else None)
    return table


def _cells(plan: SchedulePlan, row: ScheduleRow, has_memory: bool, has_bytes: bool, is_choice: bool) -> list[str]:
    cells = ["→" if is_choice else "", row.name]
    if any(other.activation for other in plan.rows):
        cells.append(row.activation or "–")
    cells += [str(row.schedule.num_stages), str(row.num_live)]
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


def notes(plan: SchedulePlan) -> list[str]:
    """Returns warnings about uneven stages, and about schedules that do not fit or cannot be built."""
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
    "Times are in ms. BF', BE', WF and WE: with weight gradients deferred. energy, force, kept: bytes that a "
    "micro-batch holds from FE to BE, from FF to BF, and from BF to BE. geom.: share of FE that is geometry, which "
    "every stage computes for itself. again: share of FE that is computed again instead of being received."
)


def schedule_legend(plan: SchedulePlan) -> str:
    """Explains the columns of :func:`schedule_table`."""
    text = (
        "live: most live micro-batches of a rank. /ideal: step over the work of the busiest rank. bound: no folded "
        "schedule of these stages is faster. gap: excess over the bound. bubble: idle share of the busiest rank."
    )
    if any(row.report.memory for row in plan.rows):
        text += " peak/rank: saved tensors."
    return text + " speed: against 1f1b-2nd. Loading data and the optimizer are not counted."


def graph_table(shares: Sequence[GraphShare], measured: Measured) -> Table:
    """Returns one row for every number of graph ranks."""
    classes = list(dict.fromkeys(name for share in shares for name in share.halo or {}))
    table = _table(
        f"Micro-batches sharded over graph ranks ({shares[0].num_microbatches} measured)",
        ("graph", "atoms", "edges"),
        [f"{name} halo" for name in classes],
        ("whole", "exchanges", "sent", "time", "memory"),
    )
    held = max(m.energy + max(m.force, m.kept) for m in measured.memory)
    for share in shares:
        if share.refused:
            table.add_row(str(share.num_ranks), *["–"] * (len(classes) + 7))
            continue
        halo = share.halo or {}
        table.add_row(
            str(share.num_ranks),
            f"{share.atoms:.2f}",
            f"{share.edges:.2f}",
            *(f"{100 * halo.get(name, 0.0):.0f} %" for name in classes),
            f"{share.num_whole}/{share.num_microbatches}",
            f"{share.num_exchanges:.0f}",
            format_bytes(share.bytes_sent),
            f"{100 * share.time:.0f} %",
            format_bytes(share.memory * held),
        )
    return table


def refusals(shares: Sequence[GraphShare]) -> list[str]:
    """Returns the reasons why atoms cannot be sharded, each once."""
    found: dict[str, list[str]] = {}
    for share in shares:
        if share.refused:
            found.setdefault(share.refused, []).append(str(share.num_ranks))
    return [f"! graph_size={', '.join(sizes)}: {why}" for why, sizes in found.items()]


GRAPH_LEGEND = (
    "atoms, edges: largest rank over the mean. halo: ghost rows over all rows. whole: micro-batches whose structures "
    "are dealt whole, so that no rows are exchanged. exchanges, sent: those of one rank for a micro-batch, in FE, FF, "
    "BF and BE of all stages. time: slowest rank over one rank with all atoms, without exchanges. memory: bytes that a "
    "micro-batch holds on the busiest stage."
)


def mesh_table(meshes: Meshes) -> Table:
    """Returns one row for every mesh; the choice is marked."""
    table = _table(
        f"{meshes.rows[0].shape.size} ranks",
        ("", "schedule"),
        ("pipeline", "data", "graph", "step ms", "after", "structures", "struct/s", "peak/rank", "shard"),
    )
    table.columns[1].justify = "left"
    for row in meshes.rows:
        chosen, rate, time = row.plan.choice, row.structures_per_second, row.step_time
        memory = "–" if row.memory is None else format_bytes(row.memory) + ("" if row.fits else " !")
        table.add_row(
            "→" if row is meshes.choice else "",
            "–" if chosen is None else chosen.name,
            *(str(size) for size in (row.shape.pipeline, row.shape.data, row.shape.graph)),
            "–" if time is None else _milliseconds(time),
            "–" if row.after is None else _milliseconds(row.after),
            f"{row.structures:g}",
            "–" if rate is None else _three_digits(rate),
            memory,
            row.plan.options.level,
            style="bold" if row is meshes.choice else None,
        )
    return table


MESH_LEGEND = (
    "schedule: the fastest that fits, with one stage on each rank. after: ms at the end of the step, which sum "
    "gradients and gather parameters. structures: in a step of all replicas. peak/rank: saved tensors, parameters, "
    "gradients and the state of Adam. Among meshes that are about as fast, the one that exchanges least is chosen: "
    "replicas before stages, stages before graph ranks."
)


def mesh_state_table(meshes: Meshes) -> Table:
    """Returns what the state of the largest rank takes on every mesh with each level of ``shard``, and its messages."""
    table = _table(
        "State of the largest rank, with Adam",
        ("pipeline", "data", "graph", "weights"),
        *((level, "step ms") for level in LEVELS),
        ("sent", "messages"),
    )
    for row in meshes.rows:
        cells = []
        for plan in row.levels:
            step = "–" if plan.choice is None else _milliseconds(plan.choice.step_time)
            cells += [format_bytes(plan.options.share.in_phases), step]
        cells += ["–"] * (2 * (len(LEVELS) - len(row.levels)))
        share = row.plan.options.share
        sizes = (str(size) for size in (row.shape.pipeline, row.shape.data, row.shape.graph))
        table.add_row(*sizes, format_bytes(row.weights), *cells, format_bytes(share.sent), str(share.num_messages))
    return table


MESH_STATE_LEGEND = (
    "weights: parameters of the largest stage. none, optimizer, parameters: bytes of parameters, gradients and "
    "optimizer state while phases run, with this level of shard, and the step with the fastest schedule that fits. "
    "sent, messages: of a rank in a step, to sum gradients and to gather parameters, if collectives pass parts on in "
    "a ring."
)


def state_table(parameters: float, accumulates: bool) -> Table:
    """Returns what each level of ``shard`` takes on a rank, for several numbers of ranks that hold a stage.

    Args:
        parameters: Bytes of the parameters of the largest rank.
        accumulates: Whether an optimizer step has several batches.
    """
    table = _table(
        f"State of the largest rank: {format_bytes(parameters)} of parameters, with Adam",
        ("shard",),
        *((f"D·G={size}", "optimizer", "sent", "mess.") for size in _SHARING),
    )
    for level in LEVELS:
        cells: list[str] = []
        for size in _SHARING:
            share = state_share(level, size, parameters, 2 * parameters, accumulates)
            cells += [format_bytes(share.in_phases), format_bytes(share.between)]
            cells += [format_bytes(share.sent), str(share.num_messages)]
        table.add_row(level, *cells)
    return table


STATE_LEGEND = (
    "D·G: replicas times graph ranks, which hold the same stages. Bytes of parameters, gradients and optimizer state "
    "while phases run, and while the optimizer steps; Adam has two values for each parameter. sent, mess.: bytes and "
    "messages of a rank in a step, if collectives pass parts on in a ring."
)


def level_lines(plans: Sequence[SchedulePlan], chosen: SchedulePlan) -> list[str]:
    """Returns a line for each level of sharing that the recipe allows, if there is a limit or other ranks share it.

    Args:
        plans: The plans of the levels.
        chosen: The one that training takes.
    """
    options = chosen.options
    if options.memory_limit is None and options.num_sharing == 1:
        return []
    lines = []
    for plan in plans:
        row, share = plan.choice, plan.options.share
        words = f'shard="{share.level}" with D·G={share.num_ranks}: '
        words += f"{format_bytes(share.in_phases)} of state on a rank, with Adam"
        if options.memory_limit is not None:
            words += f", {format_bytes(max(0.0, options.memory_limit - share.in_phases))} left for micro-batches"
        if row is None:
            lines.append(f"{words}; nothing fits")
            continue
        step = f"a step of {_milliseconds(row.step_time)} ms with {row.name}, messages between these ranks included"
        lines.append(f"{words}; {step}{', taken in what follows' if plan is chosen and len(plans) > 1 else ''}")
    return lines


def _table(title: str, *groups: Sequence[str]) -> Table:
    """Returns an empty table for narrow columns of numbers."""
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
