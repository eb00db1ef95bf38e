"""Writes timed schedules in the Trace Event Format, which ui.perfetto.dev and chrome://tracing show.

Every row (label, schedule, report) is a process and every rank a thread of it, so that predicted and recorded times lie
below each other, each counted from its first action.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_januspipe.schedule.actions import Phase, Schedule
from lightning_januspipe.schedule.figures import Panel, check_panels, first_start
from lightning_januspipe.schedule.step_report import Report

COLOUR_NAMES: Mapping[Phase, str] = {
    Phase.FE: "thread_state_runnable",
    Phase.FF: "rail_response",
    Phase.BF: "rail_animation",
    Phase.BE: "rail_idle",
    Phase.WF: "cq_build_failed",
    Phase.WE: "cq_build_running",
    Phase.UNSHARD: "good",
    Phase.RESHARD: "generic_work",
    Phase.REDUCE: "vsync_highlight_color",
}
"""The reserved colours of chrome://tracing that are nearest to those of `draw`: blues, red and orange, paler ones, and
green, grey and purple for changes of sharded state."""

_NANOSECONDS = 1e9  # per second
_PER_MICROSECOND = 1e3  # nanoseconds; the format counts microseconds, and viewers keep three decimals of them


def chrome_trace(rows: Sequence[Panel], *, seconds_per_unit: float = 1.0) -> dict[str, Any]:
    """Returns timed schedules as a trace.

    An action is a complete event named like ``FE0.3``. A message is a flow from the action that sends it to the action
    that waits for it. Changes of sharded state, which run beside the work, are in a thread of their own. The memory of
    a rank, where the report has it, is a counter of bytes.

    Args:
        rows: Label, schedule and report of every process.
        seconds_per_unit: Length of the reports' unit of time, in seconds.

    Returns:
        The trace, ready for `json.dump`.

    Raises:
        ValueError: There is no row, a report belongs to another schedule, or ``seconds_per_unit`` is not > 0.
    """
    check_panels(rows)
    if not (math.isfinite(seconds_per_unit) and seconds_per_unit > 0):
        raise ValueError(f"seconds_per_unit is {seconds_per_unit!r}, expected a number > 0: 1e-3 for milliseconds.")
    events: list[dict[str, Any]] = []
    flow = 0
    for process, (label, schedule, report) in enumerate(rows):
        clock = _Clock(first_start(report), seconds_per_unit)
        events += _names(process, label, schedule)
        events += _boxes(process, schedule, report, clock)
        for pair in _messages(process, schedule, report, clock):
            events += [{**event, "name": "message", "cat": "message", "id": flow} for event in pair]
            flow += 1
        events += _counters(process, report, clock)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(rows: Sequence[Panel], path: str | os.PathLike[str], *, seconds_per_unit: float = 1.0) -> None:
    """Writes the trace of `chrome_trace` as JSON, one event per line.

    Args:
        rows: Label, schedule and report of every process.
        path: File to write.
        seconds_per_unit: Length of the reports' unit of time, in seconds.

    Raises:
        ValueError: See `chrome_trace`.
    """
    trace = chrome_trace(rows, seconds_per_unit=seconds_per_unit)
    events = trace.pop("traceEvents")
    lines = ",\n".join(json.dumps(event, allow_nan=False) for event in events)
    rest = json.dumps(trace).removeprefix("{")
    Path(path).write_text(f'{{"traceEvents": [\n{lines}\n],\n{rest}\n', encoding="utf-8")


class _Clock:
    """Turns times of a report into whole nanoseconds, so that neighbours never overlap by a rounding error."""

    def __init__(self, origin: float, seconds_per_unit: float) -> None:
        self.origin = origin
        self.seconds_per_unit = seconds_per_unit

    def __call__(self, time: float) -> int:
        return round((time - self.origin) * self.seconds_per_unit * _NANOSECONDS)


def _names(process: int, label: str, schedule: Schedule) -> Iterator[dict[str, Any]]:
    """Yields the events that name a process and its threads."""

    def metadata(kind: str, thread: int, **values: object) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": values}

    yield metadata("process_name", 0, name=label)
    yield metadata("process_sort_index", 0, sort_index=process)
    threads = {rank: f"rank {rank}" for rank in range(schedule.num_ranks)}
    for rank, order in enumerate(schedule.actions):
        if any(action.changes_state for action in order):
            threads[schedule.num_ranks + rank] = f"rank {rank} state"
    for place, (thread, name) in enumerate(sorted(threads.items(), key=lambda item: item[0] % schedule.num_ranks)):
        yield metadata("thread_name", thread, name=name)
        yield metadata("thread_sort_index", thread, sort_index=place)


def _boxes(process: int, schedule: Schedule, report: Report, clock: _Clock) -> Iterator[dict[str, Any]]:
    for rank, order in enumerate(schedule.actions):
        for action in order:
            start, end = clock(report.start[action]), clock(report.end[action])
            yield {
                "ph": "X",
                "name": str(action),
                "cat": action.phase.value,
                "pid": process,
                "tid": rank + (schedule.num_ranks if action.changes_state else 0),
                "ts": start / _PER_MICROSECOND,
                "dur": (end - start) / _PER_MICROSECOND,
                "cname": COLOUR_NAMES[action.phase],
                "args": {"stage": action.stage, "microbatch": None if action.changes_state else action.microbatch},
            }


def _messages(
    process: int, schedule: Schedule, report: Report, clock: _Clock
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the two events of every message between ranks."""
    for rank, order in enumerate(schedule.actions):
        for action in order:
            for source in schedule.dependencies(action):
                sender = schedule.rank_of(source)
                if sender == rank:
                    continue
                # A flow belongs to the event that its ends lie in; an event's end is outside already.
                sent = max(clock(report.start[source]), clock(report.end[source]) - 1)
                yield (
                    {"ph": "s", "pid": process, "tid": sender, "ts": sent / _PER_MICROSECOND},
                    {
                        "ph": "f",
                        "bp": "e",
                        "pid": process,
                        "tid": rank,
                        "ts": clock(report.start[action]) / _PER_MICROSECOND,
                    },
                )


def _counters(process: int, report: Report, clock: _Clock) -> Iterator[dict[str, Any]]:
    """Yields the bytes that each rank holds; the last of several values at one time counts."""
    for rank, steps in enumerate(report.memory):
        for time, held in {clock(time): held for time, held in steps}.items():
            yield {
                "ph": "C",
                "name": f"bytes held by rank {rank}",
                "pid": process,
                "tid": rank,
                "ts": time / _PER_MICROSECOND,
                "args": {"bytes": held},
            }
