import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest

from lightning_januspipe.schedule import Action, Phase, PhaseCosts, Report, Schedule, build_schedule, simulate
from lightning_januspipe.schedule.actions import COMPUTED_PHASES
from lightning_januspipe.schedule.draw import PHASE_COLOURS, gantt, gantt_figure, memory, memory_figure

COSTS = PhaseCosts(1.0, 1.4, 1.3, 0.9, wf=1.1, we=0.8)
GB = 1e9


def _deferred(schedule):
    """The schedule with WF and WE right after the phases that they are split from."""
    after = {Phase.BF: Phase.WF, Phase.BE: Phase.WE}
    orders = []
    for order in schedule.actions:
        split = []
        for action in order:
            split.append(action)
            if action.phase in after:
                split.append(Action(after[action.phase], action.stage, action.microbatch))
        orders.append(tuple(split))
    return replace(schedule, name="deferred", actions=tuple(orders))


def _two_stages_per_rank():
    orders = (
        "FE0.0 FE3.0 FF3.0 FF0.0 BF0.0 BF3.0 BE3.0 BE0.0",
        "FE1.0 FE2.0 FF2.0 FF1.0 BF1.0 BF2.0 BE2.0 BE1.0",
    )
    actions = tuple(tuple(map(Action.parse, order.split())) for order in orders)
    return Schedule("zigzag", 2, 1, actions, (0, 1, 1, 0))


def _timed(label, schedule, comm=0.0):
    return label, schedule, simulate(schedule, COSTS, comm=comm)


def _later(row, delay):
    """The same times on a clock that began earlier."""
    label, schedule, report = row
    start = {action: time + delay for action, time in report.start.items()}
    end = {action: time + delay for action, time in report.end.items()}
    curves = tuple(tuple((time + delay, held) for time, held in curve) for curve in report.memory)
    return label, schedule, replace(report, start=start, end=end, memory=curves)


def _with_memory(row, *curves):
    label, schedule, report = row
    return label, schedule, replace(report, memory=curves)


@pytest.fixture(scope="module")
def rows():
    wavek = build_schedule("wavek", 4, 8, COSTS)
    return [_timed("wavek", wavek), _timed("deferred", _deferred(wavek)), _timed("slow", _deferred(wavek), comm=0.5)]


def _boxes(axes, name):
    """(rank, start, end) of the boxes of a collection; rank 0 is on top."""
    found = []
    for collection in axes.collections:
        if collection.get_gid().split("-", 1)[1] == name:
            for path in collection.get_paths():
                x, y = path.vertices[:, 0], path.vertices[:, 1]
                assert y.max() - y.min() < 1.0
                found.append((round(float(y.mean())), float(x.min()), float(x.max())))
    return sorted(found)


def _expected(row, phase):
    _, schedule, report = row
    origin = min(report.start.values())
    return sorted(
        (rank, report.start[action] - origin, report.end[action] - origin)
        for rank, order in enumerate(schedule.actions)
        for action in order
        if action.phase is phase
    )


def _assert_same_boxes(found, expected):
    assert len(found) == len(expected)
    for box, other in zip(found, expected, strict=True):
        assert box == pytest.approx(other)


def test_every_action_is_a_box_of_its_time_in_the_row_of_its_rank(rows):
    rows = [*rows, _later(rows[2], 1000.0)]
    figure = gantt_figure(rows)
    assert len(figure.axes) == len(rows)
    for axes, row in zip(figure.axes, rows, strict=True):
        for phase in Phase:
            _assert_same_boxes(_boxes(axes, phase.value), _expected(row, phase))
        assert sum(len(_boxes(axes, phase.value)) for phase in Phase) == sum(map(len, row[1].actions))
        assert _boxes(axes, "bubbles") == [(rank, 0.0, row[2].makespan) for rank in range(4)]
        top, bottom = axes.get_ylim()
        assert top > 3 and bottom < 0


def test_panels_share_the_time_axis(rows):
    for figure in (gantt_figure(rows), gantt_figure([_later(row, 50.0) for row in rows])):
        (limits,) = {axes.get_xlim() for axes in figure.axes}
        assert limits[0] == 0.0
        assert limits[1] >= max(report.makespan for _, _, report in rows)
        assert len({(axes.get_position().x0, axes.get_position().x1) for axes in figure.axes}) == 1


def test_panels_lie_below_one_another_with_rows_of_one_height(rows):
    figure = gantt_figure([rows[0], _timed("two", _two_stages_per_rank()), rows[1]])
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert boxes[0].height == pytest.approx(2 * boxes[1].height)
    assert boxes[-1].y0 > 0 and boxes[0].y1 < 1


def test_phases_have_their_colours(rows):
    from matplotlib.colors import to_hex

    (axes,) = gantt_figure(rows[1:2]).axes
    found = {collection.get_gid(): to_hex(collection.get_facecolor()[0]).upper() for collection in axes.collections}
    assert {name: found[f"panel0-{name.value}"] for name in COMPUTED_PHASES} == {
        name: PHASE_COLOURS[name] for name in COMPUTED_PHASES
    }


def test_time_axes_of_steps_of_unlike_length(rows):
    """Panels share an axis, or each has one that is as long as its step."""
    label, schedule, report = rows[0]
    longer = simulate(schedule, PhaseCosts(*[30.0] * 6))
    for one_axis in (True, False):
        figure = gantt_figure([(label, schedule, report), (label, schedule, longer)], one_axis=one_axis)
        ends = [axes.get_xlim()[1] for axes in figure.axes]
        assert ends[1] == pytest.approx(1.01 * longer.makespan)
        assert ends[0] == pytest.approx(1.01 * (longer if one_axis else report).makespan)


def test_titles_give_the_numbers(rows):
    figure = gantt_figure(rows, unit="ms", title="Four ranks")
    for axes, (label, _, report) in zip(figure.axes, rows, strict=True):
        assert axes.get_title("left") == label
        ratio = report.makespan / report.ideal
        mean, worst = sum(report.bubbles) / 4, max(report.bubbles)
        assert axes.get_title("right") == (
            f"makespan {report.makespan:.4g} ms = {ratio:.3f} × ideal, bubbles {mean:.1%}"
            + ("" if worst - min(report.bubbles) < 0.001 else f" mean, {worst:.1%} worst")
        )
        (line,) = axes.lines
        assert list(line.get_xdata()) == [report.ideal] * 2
    assert figure.axes[-1].get_xlabel() == "time (ms)"
    assert "Four ranks" in [text.get_text() for text in figure.texts]


def test_legend_is_there_once_and_names_what_is_drawn(rows):
    (legend,) = gantt_figure(rows[:1]).legends
    four = ["FE forward energy", "FF forward force", "BF backward force", "BE backward energy"]
    assert [text.get_text() for text in legend.get_texts()] == [*four, "bubble", "ideal time"]
    figure = gantt_figure([*rows, _timed("two", _two_stages_per_rank())])
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*four, "WF weights of BF", "WE weights of BE", "bar: later stage", "bubble", "ideal time"]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_later_stages_of_a_rank_are_marked(rows):
    row = _timed("two", _two_stages_per_rank())
    plain, (axes,) = gantt_figure(rows).axes, gantt_figure([row]).axes
    later = {(0, 3), (1, 2)}
    expected = [
        (rank, row[2].start[action], row[2].end[action])
        for rank, order in enumerate(row[1].actions)
        for action in order
        if (rank, action.stage) in later
    ]
    _assert_same_boxes(_boxes(axes, "bars"), sorted(expected))
    assert not any(_boxes(panel, "bars") for panel in plain)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(4, 8), (8, 16)])
def test_boxes_hold_their_numbers(num_ranks, num_microbatches):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    label, schedule, report = _timed("1f1b", build_schedule("1f1b-fold", num_ranks, num_microbatches, COSTS))
    figure = gantt_figure([(label, schedule, report)])
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {(round(text.get_position()[1]), round(text.get_position()[0], 6)): text for text in axes.texts}
    for rank, order in enumerate(schedule.actions):
        for action in order:
            start, end = report.start[action], report.end[action]
            text = texts.pop((rank, round((start + end) / 2, 6)))
            assert text.get_text() == str(action.microbatch)
            box = axes.transData.transform([(start, rank + 0.5), (end, rank - 0.5)])
            extent = text.get_window_extent(renderer)
            assert box[0][0] <= extent.x0 and extent.x1 <= box[1][0]
            assert box[0][1] <= extent.y0 and extent.y1 <= box[1][1]
    assert not texts


def test_short_actions_have_no_number():
    schedule = build_schedule("1f1b-fold", 4, 12, COSTS)
    report = simulate(schedule, PhaseCosts(0.2, 5.0, 5.0, 5.0))
    (axes,) = gantt_figure([("uneven", schedule, report)]).axes
    assert len(axes.texts) == 3 * 4 * 12
    centres = {round(text.get_position()[0], 6) for text in axes.texts}
    long = [action for action in report.end if action.phase is not Phase.FE]
    assert centres == {round((report.start[action] + report.end[action]) / 2, 6) for action in long}


def test_narrow_boxes_in_a_row_share_a_number():
    orders = [[Action(phase, stage, 7) for stage in range(40)] for phase in (Phase.FE, Phase.BF)]
    orders += [[Action(phase, stage, 7) for stage in reversed(range(40))] for phase in (Phase.FF, Phase.BE)]
    actions = (*orders[0], *orders[2], *orders[1], *orders[3])
    ends = {action: place + 1.0 + (3.0 if place >= 20 else 0.0) for place, action in enumerate(actions)}
    starts = {action: end - 1.0 for action, end in ends.items()}
    report = Report(163.0, 160.0, (1,), starts, ends)
    (axes,) = gantt_figure([("long chain", Schedule("chain", 1, 1000, (actions,), (0,) * 40), report)]).axes
    numbers = [(text.get_position()[0], text.get_text()) for text in axes.texts]
    assert numbers == [(10.0, "7"), (33.0, "7"), (63.0, "7"), (103.0, "7"), (143.0, "7")]


def test_large_schedules_are_drawn_without_numbers():
    schedule = build_schedule("gpipe", 16, 96, COSTS)
    (axes,) = gantt_figure([_timed("gpipe", schedule)]).axes
    assert not axes.texts
    assert sum(len(_boxes(axes, phase.value)) for phase in Phase) == 4 * 16 * 96
    assert max(axes.get_figure().get_size_inches()) <= 24.0


def test_memory_draws_the_steps_of_every_rank(rows):
    curves = ((0.0, 0.0), (1.0, 2 * GB), (3.0, 6 * GB), (3.0, 1 * GB)), ((0.0, 0.0), (2.0, 3 * GB)), (), ((0.0, 0.0),)
    row = _with_memory(rows[0], *curves)
    taller = _with_memory(rows[1], *[((0.0, 7 * GB),)] * 4)
    figure = memory_figure([_later(row, 10.0), taller], unit="s", limit=6.5 * GB)
    first, second = figure.axes
    lines = {line.get_gid(): line for line in first.lines}
    assert set(lines) == {"panel0-rank0", "panel0-rank1", "panel0-rank3", None}
    makespan = row[2].makespan
    line = lines["panel0-rank0"]
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_xdata()) == pytest.approx([0.0, 1.0, 3.0, 3.0, makespan])
    assert list(line.get_ydata()) == pytest.approx([0.0, 2.0, 6.0, 1.0, 1.0])
    assert list(lines[None].get_ydata()) == [6.5, 6.5]
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] > 7.0
    assert first.get_ylabel() == "held (GB)"
    assert (first.get_title("left"), first.get_title("right")) == ("wavek", "peak 6 GB on rank 0")
    assert second.get_title("right") == "peak 7 GB on rank 0, more than the limit"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["rank 0", "rank 1", "rank 2", "rank 3", "limit 6.5 GB"]


@pytest.mark.parametrize(("held", "text"), [(2.5e9, "2.5 GB"), (31.4e6, "31.4 MB"), (2000.0, "2 kB"), (0.0, "0 B")])
def test_memory_is_in_a_unit_that_fits(rows, held, text):
    (axes,) = memory_figure([_with_memory(rows[0], *[((0.0, held),)] * 4)]).axes
    assert axes.get_title("right") == f"peak {text} on rank 0"


def test_files_are_valid_and_the_same_each_time(rows, tmp_path):
    import matplotlib

    rows = [_with_memory(row, *[((0.0, 1.0), (2.0, 3.0))] * 4) for row in rows[:1]]
    for draw in (gantt, memory):
        for suffix, settings in (
            (".svg", {}),
            (".svg", {"font.family": "monospace", "svg.hashsalt": "x"}),
            (".PNG", {}),
        ):
            path = tmp_path / f"{draw.__name__}{suffix}"
            draw(rows, path, unit="ms", title="a < b & c")
            content = path.read_bytes()
            with matplotlib.rc_context(settings):
                draw(rows, str(path), unit="ms", title="a < b & c")
            assert path.read_bytes() == content
            if suffix == ".svg":
                assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
                assert matplotlib.__version__.encode() not in content and b"dc:date" not in content
            else:
                assert content.startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("draw", [gantt, memory])
@pytest.mark.parametrize("name", ["picture.pdf", "picture", "svg"])
def test_other_suffixes_are_refused(rows, draw, name, tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        draw([_with_memory(rows[0], *[((0.0, GB),)] * 4)], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(rows):
    label, schedule, report = rows[0]
    with pytest.raises(ValueError, match="rows is empty"):
        gantt_figure([])
    with pytest.raises(ValueError, match=r"report of 'wavek' has no time for WF0\.0.*its own report"):
        gantt_figure([(label, rows[1][1], report)])
    with pytest.raises(ValueError, match="report of 'wavek' is empty"):
        gantt_figure([(label, schedule, replace(report, start={}, end={}))])
    with pytest.raises(ValueError, match="report of 'wavek' has no memory"):
        memory_figure([_with_memory(rows[1], *[((0.0, 1.0),)] * 4), rows[0]])
    with pytest.raises(ValueError, match="limit is 0, expected a number of bytes > 0"):
        memory_figure([_with_memory(rows[1], *[((0.0, 1.0),)] * 4)], limit=0)
