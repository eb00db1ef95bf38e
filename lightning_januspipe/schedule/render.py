"""Draws a schedule as a text grid: one row per rank, one column per time slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_januspipe.schedule.actions import Schedule

if TYPE_CHECKING:
    from lightning_januspipe.schedule.step_report import Report

IDLE = "."
RUNNING = "-"


def render(
    schedule: Schedule,
    report: Report | None = None,
    *,
    marked: tuple[int, int] | None = None,
    max_columns: int | None = None,
) -> str:
    """Returns a schedule as a grid of text, with ranks as rows and time slots as columns.

    Without a report the columns count the actions of each rank; this works for invalid schedules too. With the report
    of a simulation a column is as long as the shortest action: an action is written where it starts, ``-`` goes on for
    as long as it runs, and ``.`` is a bubble. Changes of sharded state, which run beside the work, are in rows of their
    own then.

    Args:
        schedule: The schedule to draw.
        report: The result of `simulate` for this schedule, for columns of time.
        marked: Rank of an action to be marked as ``>FE0.3<``, and its index in the rank's order.
        max_columns: Most columns to draw, around the marked action or else from the start; None draws all.
    """
    rows = _orders(schedule) if report is None else _time_slots(schedule, report)
    column = 0
    if marked is not None:
        rank, index = marked
        text = str(schedule.actions[rank][index])
        column = index if report is None else rows[rank].index(text)
        rows[rank][column] = f">{text}<"
    num_columns = max(map(len, rows), default=0)
    first, last = _window(num_columns, column, max_columns)
    header = [str(number) for number in range(first, last)]
    cells = [[*row[first:last], *[""] * (last - max(first, len(row)))] for row in rows]
    width = max((len(cell) for row in [header, *cells] for cell in row), default=1)
    labels = [f"rank {rank}" for rank in range(schedule.num_ranks)]
    if len(rows) > schedule.num_ranks:
        labels = [label for rank in labels for label in (rank, f"{rank} state")]
    label = max(map(len, labels))
    lines = [" ".join([" " * label, *(cell.rjust(width) for cell in header)])]
    lines += [
        " ".join([name.ljust(label), *(cell.rjust(width) for cell in row)])
        for name, row in zip(labels, cells, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _orders(schedule: Schedule) -> list[list[str]]:
    return [[str(action) for action in order] for order in schedule.actions]


def _time_slots(schedule: Schedule, report: Report) -> list[list[str]]:
    slot = min(end - report.start[action] for action, end in report.end.items() if end and not action.changes_state)
    num_slots = max(1, round(report.makespan / slot))
    rows = []
    has_state = any(action.changes_state for order in schedule.actions for action in order)
    orders = [
        [action for action in order if action.changes_state == is_state]
        for order in schedule.actions
        for is_state in ((False, True) if has_state else (False,))
    ]
    for order in orders:
        row = [IDLE] * num_slots
        free = 0
        for action in order:
            # Starts are at least one slot apart, but rounding may put two into one slot.
            begin = max(free, round(report.start[action] / slot))
            free = max(begin + 1, round(report.end[action] / slot))
            row += [IDLE] * (free - len(row))
            row[begin:free] = [str(action), *[RUNNING] * (free - begin - 1)]
        rows.append(row)
    return rows


def _window(num_columns: int, centre: int, max_columns: int | None) -> tuple[int, int]:
    if max_columns is None or num_columns <= max_columns:
        return 0, num_columns
    first = min(max(0, centre - max_columns // 2), num_columns - max_columns)
    return first, first + max_columns
