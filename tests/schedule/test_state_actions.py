"""Changes of sharded state in schedules: where they stand, which are refused, what they cost, how they look."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import COSTS, NAMES, ONES, actions, requests, schedule_of

from lightning_januspipe.schedule import (
    Link,
    MemoryCosts,
    Schedule,
    ScheduleError,
    StateCosts,
    build_schedule,
    simulate,
    validate_schedule,
)
from lightning_januspipe.schedule.actions import Action
from lightning_januspipe.schedule.chrome_trace import chrome_trace
from lightning_januspipe.schedule.draw import gantt_figure
from lightning_januspipe.schedule.render import render
from lightning_januspipe.schedule.state_actions import with_state_changes

STEP = "FE0.0 FF0.0 BF0.0 BE0.0"


def _changes(schedule, rank):
    return [str(action) for action in schedule.actions[rank] if action.changes_state]


def test_parameters_are_there_for_all_phases_and_gradients_are_reduced_after_the_last():
    schedule = with_state_changes(build_schedule("gpipe", 2, 2, ONES), "parameters")
    for rank, order in enumerate(schedule.actions):
        assert [str(a) for a in order[:1]] == [f"UNSHARD{rank}"]
        assert [str(a) for a in order[-2:]] == [f"RESHARD{rank}", f"REDUCE{rank}"]
    assert with_state_changes(build_schedule("gpipe", 2, 2, ONES), "optimizer").actions == tuple(
        tuple(a for a in order if str(a)[:2] not in ("UN", "RE") or str(a).startswith("REDUCE"))
        for order in schedule.actions
    )


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_all_schedules_stay_valid(data):
    name = data.draw(st.sampled_from(NAMES))
    positional, named = data.draw(requests(name, max_ranks=4, max_microbatches=6))
    schedule = build_schedule(*positional, **named)
    level, reduces = data.draw(st.sampled_from(["optimizer", "parameters"])), data.draw(st.booleans())
    changed = with_state_changes(schedule, level, reduces=reduces)
    validate_schedule(changed)
    assert Schedule.parse(str(changed)) == changed == Schedule.from_csv(changed.to_csv())
    without = tuple(tuple(a for a in order if not a.changes_state) for order in changed.actions)
    assert without == schedule.actions
    assert with_state_changes(schedule, "none") is schedule


def test_the_order_does_not_depend_on_the_number_of_micro_batches():
    costs = [COSTS] * 4
    for number in range(1, 9):
        schedule = with_state_changes(build_schedule("wavek-zb", 2, number, costs, chunks=2), "parameters")
        for rank in range(2):
            stages = schedule.stages_of(rank)
            found = [c for c in _changes(schedule, rank) if not c.startswith("RESHARD")]
            assert found == [f"UNSHARD{s}" for s in stages] + [f"REDUCE{s}" for s in reversed(stages)]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("FE0.0 UNSHARD0 FF0.0 BF0.0 BE0.0", "FE0.0 on rank 0 computes with parameters that are not there: .*before"),
        ("UNSHARD0 FE0.0 FF0.0 RESHARD0 BF0.0 BE0.0", "BF0.0 on rank 0 computes with .* stage 0 were released before"),
        ("RESHARD0 FE0.0 FF0.0 BF0.0 BE0.0", "RESHARD0 on rank 0 releases parameters that are not there"),
        ("UNSHARD0 UNSHARD0 FE0.0 FF0.0 BF0.0 BE0.0", "UNSHARD0 on rank 0 gathers parameters for the second time"),
        ("FE0.0 FF0.0 BF0.0 REDUCE0 BE0.0", "BE0.0 on rank 0 adds to gradients that REDUCE0 has reduced before"),
        (f"{STEP} REDUCE0 REDUCE0", "REDUCE0 on rank 0 is out of order"),
    ],
)
def test_mistakes_are_refused(order, message):
    with pytest.raises(ScheduleError, match=message):
        validate_schedule(schedule_of(order))


def test_mistakes_of_several_stages_are_refused():
    both = "FE0.0 FE1.0 FF1.0 FF0.0 BF0.0 BF1.0 BE1.0 {} BE0.0 {}"
    valid = schedule_of(both.format("REDUCE1", "REDUCE0"), placement=(0, 0))
    validate_schedule(valid)
    for first, second, message in (
        ("", "REDUCE0 REDUCE1", "REDUCE1 on rank 0 is out of order"),
        ("", "REDUCE0", "no REDUCE1 follows BE1.0"),
    ):
        with pytest.raises(ScheduleError, match=message):
            validate_schedule(schedule_of(both.format(first, second), placement=(0, 0)))
    order = actions("UNSHARD1 UNSHARD0") + valid.actions[0]
    with pytest.raises(ScheduleError, match="UNSHARD0 on rank 0 is out of order"):
        validate_schedule(replace(valid, actions=(order,)))
    with pytest.raises(ScheduleError, match="REDUCE1 on rank 0 is on rank 0, but|REDUCE0 is on rank 1, but"):
        split = schedule_of("FE0.0 FF0.0 BF0.0 BE0.0", "FE1.0 FF1.0 BF1.0 BE1.0 REDUCE0")
        validate_schedule(split)


def test_collectives_run_beside_phases():
    schedule = schedule_of("UNSHARD0 UNSHARD1 FE0.0 FE1.0 FF1.0 FF0.0 BF0.0 BF1.0 BE1.0 REDUCE1 BE0.0 REDUCE0 RESHARD0 "
                           "RESHARD1", placement=(0, 0))  # fmt: skip
    state = [StateCosts(2.0, 3.0, 100.0, 10.0), StateCosts(4.0, 0.5, 200.0, 20.0)]
    report = simulate(schedule, [ONES, ONES], state=state, memory=[MemoryCosts(0, 0)] * 2)
    start, end = ({str(a): t for a, t in times.items()} for times in (report.start, report.end))
    assert (start["UNSHARD0"], end["UNSHARD0"], start["UNSHARD1"], end["UNSHARD1"]) == (0, 2, 2, 6)
    assert (start["FE0.0"], start["FE1.0"], start["BE0.0"]) == (2, 6, 12)
    assert (start["REDUCE1"], end["REDUCE1"], start["REDUCE0"], end["REDUCE0"]) == (12, 12.5, 13, 16)
    assert report.makespan == 16 and report.busy == (8,)
    assert report.hidden_reduction == pytest.approx(0.5 / 3.5)
    (curve,) = report.memory
    held = dict(curve)
    assert (held[0], held[2], held[9], held[10], held[12.5], held[13], held[16]) == (100, 300, 310, 330, 310, 10, 0)


def test_costs_of_a_ring():
    found = StateCosts.of(4, 100.0, Link(latency=1.0, bandwidth=5.0))
    assert found == StateCosts(3 * (1.0 + 25.0 / 5.0), 18.0, 100.0, 100.0)
    with pytest.raises(ValueError, match=r"StateCosts\.reduce is -1"):
        StateCosts(0.0, -1.0)


def test_without_changes_there_is_no_reduction_to_hide():
    assert simulate(schedule_of(STEP), ONES).hidden_reduction is None


def test_pictures_show_them():
    schedule = with_state_changes(build_schedule("1f1b-fold", 2, 2, ONES), "parameters")
    report = simulate(schedule, ONES, state=StateCosts(1.0, 2.0))
    text = render(schedule, report).splitlines()
    assert [line.split()[:3] for line in text[1:]] == [
        ["rank", "0", "."], ["rank", "0", "state"], ["rank", "1", "."], ["rank", "1", "state"]
    ]  # fmt: skip
    assert "REDUCE1" in text[4] and "REDUCE1" not in text[3] and "UNSHARD0" in render(schedule)
    events = chrome_trace([("one", schedule, report)])["traceEvents"]
    threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert threads["rank 1 state"] == 3
    (reduce,) = [e for e in events if e["name"] == "REDUCE1"]
    assert (reduce["tid"], reduce["dur"]) == (3, 2e6)
    (axes,) = gantt_figure([("one", schedule, report)]).axes
    boxes = {c.get_gid(): c.get_paths() for c in axes.collections}
    assert len(boxes["panel0-REDUCE"]) == len(boxes["panel0-UNSHARD"]) == 2
    assert boxes["panel0-REDUCE"][0].get_extents().height < 0.5 * boxes["panel0-FE"][0].get_extents().height
    assert Action.parse("REDUCE1") in report.end
