import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from lightning_januspipe.schedule import Action, PhaseCosts, build_schedule, simulate
from lightning_januspipe.schedule.actions import successor
from lightning_januspipe.schedule.chrome_trace import chrome_trace, write_chrome_trace

COSTS = PhaseCosts(0.1, 0.13, 0.24, 0.125)


@pytest.fixture(scope="module")
def rows():
    wavek, gpipe = build_schedule("wavek", 4, 8, COSTS), build_schedule("gpipe", 2, 3, COSTS)
    late = simulate(gpipe, COSTS, comm=0.01)
    start = {action: time + 7.0 for action, time in late.start.items()}
    end = {action: time + 7.0 for action, time in late.end.items()}
    held = (((7.0, 0.0), (7.0, 5.0), (8.5, 2.0)), ((7.25, 3.0),))
    return [
        ("predicted", wavek, simulate(wavek, COSTS)),
        ("recorded", gpipe, replace(late, start=start, end=end, memory=held)),
    ]


def _of_kind(trace, kind):
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def test_every_action_is_a_complete_event(rows):
    events = {(event["pid"], event["name"]): event for event in _of_kind(chrome_trace(rows), "X")}
    assert len(events) == 4 * 4 * 8 + 4 * 2 * 3
    for process, (_, schedule, report) in enumerate(rows):
        origin = min(report.start.values())
        for rank, order in enumerate(schedule.actions):
            for action in order:
                event = events.pop((process, str(action)))
                assert event["tid"] == rank
                assert event["cat"] == action.phase.value
                assert event["args"] == {"stage": action.stage, "microbatch": action.microbatch}
                assert event["ts"] == pytest.approx((report.start[action] - origin) * 1e6, abs=1e-3)
                assert event["dur"] == pytest.approx((report.end[action] - report.start[action]) * 1e6, abs=2e-3)
    assert not events


def test_events_of_a_thread_do_not_overlap(rows):
    # In thirds of a unit the sums do not come out even.
    for unit in (1.0, 1e-3 / 3, 1e-6):
        threads = defaultdict(list)
        for event in _of_kind(chrome_trace(rows, seconds_per_unit=unit), "X"):
            start = round(event["ts"] * 1000)
            threads[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
        assert len(threads) == 6
        for spans in threads.values():
            spans.sort()
            assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_unit_scales_the_times(rows):
    seconds, milliseconds = chrome_trace(rows), chrome_trace(rows, seconds_per_unit=1e-3)
    for long, short in zip(_of_kind(seconds, "X"), _of_kind(milliseconds, "X"), strict=True):
        assert short["ts"] == pytest.approx(long["ts"] / 1000, abs=1e-3)
        assert short["dur"] == pytest.approx(long["dur"] / 1000, abs=2e-3)


def test_processes_and_threads_have_names_and_an_order(rows):
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in _of_kind(chrome_trace(rows), "M")}
    for process, (label, schedule, _) in enumerate(rows):
        assert names["process_name", process, 0] == {"name": label}
        assert names["process_sort_index", process, 0] == {"sort_index": process}
        for rank in range(schedule.num_ranks):
            assert names["thread_name", process, rank] == {"name": f"rank {rank}"}
            assert names["thread_sort_index", process, rank] == {"sort_index": rank}
    assert len(names) == 2 * 2 + 2 * (4 + 2)


def test_messages_flow_from_sender_to_receiver(rows):
    trace = chrome_trace(rows)
    boxes = defaultdict(list)
    for event in _of_kind(trace, "X"):
        boxes[event["pid"], event["tid"]].append(event)

    def around(end):
        (box,) = [b for b in boxes[end["pid"], end["tid"]] if b["ts"] <= end["ts"] < b["ts"] + b["dur"]]
        return end["pid"], Action.parse(box["name"])

    starts = {event["id"]: event for event in _of_kind(trace, "s")}
    ends = {event["id"]: event for event in _of_kind(trace, "f")}
    assert len(starts) == len(_of_kind(trace, "s")) and starts.keys() == ends.keys()
    found = set()
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] < end["ts"] and end["bp"] == "e"
        found.add((around(start), around(end)))
    expected = set()
    for process, (_, schedule, _) in enumerate(rows):
        for order in schedule.actions:
            for action in order:
                after = successor(action, schedule.num_stages)
                if after is not None and schedule.rank_of(after) != schedule.rank_of(action):
                    expected.add(((process, action), (process, after)))
    assert found == expected
    assert len(starts) == len(expected) == 4 * 3 * 8 + 4 * 1 * 3


def test_memory_is_a_counter(rows):
    events = _of_kind(chrome_trace(rows), "C")
    assert [(e["pid"], e["name"], e["ts"], e["args"]) for e in events] == [
        (1, "bytes held by rank 0", 0.0, {"bytes": 5.0}),
        (1, "bytes held by rank 0", 1.5e6, {"bytes": 2.0}),
        (1, "bytes held by rank 1", 0.25e6, {"bytes": 3.0}),
    ]


def test_file_holds_the_trace_and_is_the_same_each_time(rows, tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(rows, path, seconds_per_unit=0.5)
    content = path.read_bytes()
    assert json.loads(content) == chrome_trace(rows, seconds_per_unit=0.5)
    assert max(map(len, content.splitlines())) < 300
    write_chrome_trace(rows, str(path), seconds_per_unit=0.5)
    assert path.read_bytes() == content


def test_wrong_arguments_are_refused(rows):
    with pytest.raises(ValueError, match="rows is empty"):
        chrome_trace([])
    for unit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds_per_unit is .*expected a number > 0"):
            chrome_trace(rows, seconds_per_unit=unit)
    with pytest.raises(ValueError, match="has no time for"):
        chrome_trace([("mixed", rows[0][1], rows[1][2])])
