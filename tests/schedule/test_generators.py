from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_januspipe.schedule import Phase, PhaseCosts, Schedule, build_schedule, simulate, validate
from lightning_januspipe.schedule.actions import CHAIN_PHASES
from lightning_januspipe.schedule.list_scheduler import (
    BREADTH_FIRST,
    DEPTH_FIRST,
    Priority,
    list_schedule,
    lower_bound,
)
from lightning_januspipe.schedule.wavek import search_wavek

COSTS = PhaseCosts(1.0, 1.3, 2.4, 1.25)
GOLDEN = {
    "gpipe-p2-m3": ("gpipe", 2, 3, "auto"),
    "gpipe-p1-m2": ("gpipe", 1, 2, "auto"),
    "1f1b-fold-p3-m5": ("1f1b-fold", 3, 5, "auto"),
    "1f1b-fold-p4-m2": ("1f1b-fold", 4, 2, "auto"),
    "wavek-p2-m4": ("wavek", 2, 4, "auto"),
    "wavek-p3-m6-k2": ("wavek", 3, 6, 2),
    "wavek-p4-m8": ("wavek", 4, 8, "auto"),
}

times = st.floats(0.2, 5.0)
phase_costs = st.builds(PhaseCosts, times, times, times, times, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
sizes = {"num_ranks": st.integers(1, 6), "num_microbatches": st.integers(1, 12)}


def _bound(num_ranks, num_microbatches, costs):
    be = costs.be + costs.we
    return num_microbatches * costs.total + (num_ranks - 1) * (costs.fe + be)


def _assert_complete(schedule):
    for rank, order in enumerate(schedule.actions):
        expected = {(phase, m) for phase in CHAIN_PHASES for m in range(schedule.num_microbatches)}
        assert {(action.phase, action.microbatch) for action in order} == expected
        assert len(order) == len(expected)
        assert {action.stage for action in order} == {rank}


@settings(max_examples=40, deadline=None)
@given(
    **sizes,
    costs=phase_costs,
    name=st.sampled_from(["1f1b-fold", "wavek"]),
    wave_size=st.one_of(st.just("auto"), st.integers(1, 14)),
    max_live=st.one_of(st.none(), st.integers(1, 14)),
)
def test_every_schedule_is_valid_and_within_its_cap(num_ranks, num_microbatches, costs, name, wave_size, max_live):
    schedule = build_schedule(name, num_ranks, num_microbatches, costs, wave_size=wave_size, max_live=max_live)
    validate(schedule)
    _assert_complete(schedule)
    report = simulate(schedule, costs)
    default = num_ranks if name == "1f1b-fold" else 2 * num_ranks
    assert max(report.peak_live) <= (default if max_live is None else max_live)
    assert report.makespan >= _bound(num_ranks, num_microbatches, costs) * (1 - 1e-9)
    assert report.makespan >= num_ranks * costs.total * (1 - 1e-9)
    assert report.ideal == pytest.approx(num_microbatches * costs.total)
    assert build_schedule(name, num_ranks, num_microbatches, costs, wave_size=wave_size, max_live=max_live) == schedule


@given(**sizes, costs=phase_costs)
@settings(max_examples=20, deadline=None)
def test_gpipe_goes_phase_by_phase(num_ranks, num_microbatches, costs):
    schedule = build_schedule("gpipe", num_ranks, num_microbatches, costs)
    _assert_complete(schedule)
    for order in schedule.actions:
        assert [action.phase for action in order] == [phase for phase in CHAIN_PHASES for _ in range(num_microbatches)]
    report = simulate(schedule, costs)
    assert report.peak_live == (num_microbatches,) * num_ranks
    assert report.makespan >= _bound(num_ranks, num_microbatches, costs) * (1 - 1e-9)


@given(**sizes, costs=phase_costs)
@settings(max_examples=20, deadline=None)
def test_1f1b_fold_does_not_look_at_the_costs(num_ranks, num_microbatches, costs):
    schedule = build_schedule("1f1b-fold", num_ranks, num_microbatches, costs)
    assert schedule == build_schedule("1f1b-fold", num_ranks, num_microbatches, COSTS)


def test_1f1b_fold_on_one_rank_finishes_a_microbatch_before_the_next():
    (order,) = build_schedule("1f1b-fold", 1, 3, COSTS).actions
    assert [(action.microbatch, action.phase) for action in order] == [(m, p) for m in range(3) for p in CHAIN_PHASES]


@given(**sizes, costs=phase_costs, max_live=st.one_of(st.none(), st.integers(1, 14)))
@settings(max_examples=25, deadline=None)
def test_wavek_is_never_slower_than_1f1b_fold(num_ranks, num_microbatches, costs, max_live):
    makespans = [
        simulate(build_schedule(name, num_ranks, num_microbatches, costs, max_live=max_live), costs).makespan
        for name in ("wavek", "1f1b-fold")
    ]
    assert makespans[0] <= makespans[1] * (1 + 1e-9)


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_wavek_reaches_the_bound_with_measured_costs(num_ranks):
    wavek = simulate(build_schedule("wavek", num_ranks, 16, COSTS), COSTS)
    fold = simulate(build_schedule("1f1b-fold", num_ranks, 16, COSTS), COSTS)
    assert wavek.makespan == pytest.approx(_bound(num_ranks, 16, COSTS))
    assert wavek.makespan < 0.75 * fold.makespan


def test_wave_size_is_a_memory_knob():
    makespans = []
    for wave_size in (1, 2, 4, 8):
        report = simulate(build_schedule("wavek", 4, 16, COSTS, wave_size=wave_size), COSTS)
        assert max(report.peak_live) <= min(2 * wave_size, 8)
        makespans.append(report.makespan)
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > 1.5 * makespans[-1]


def test_wavek_adapts_to_a_slow_rank():
    slow = PhaseCosts(2.0, 2.6, 4.8, 2.5)
    costs = (COSTS, slow, COSTS)
    choice = search_wavek(3, 8, costs)
    report = simulate(choice.schedule, costs)
    assert report.makespan == pytest.approx(choice.makespan)
    assert report.makespan <= simulate(build_schedule("wavek", 3, 8, COSTS), costs).makespan * (1 + 1e-9)
    assert report.makespan >= 8 * slow.total


def test_deferrable_parts_are_not_left_out():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0, wf=1.0, we=1.0)
    fused = PhaseCosts(1.0, 1.0, 2.0, 2.0)
    assert build_schedule("wavek", 4, 8, costs) == build_schedule("wavek", 4, 8, fused)
    assert lower_bound(costs, 4, 8) == lower_bound(fused, 4, 8) == 8 * 6.0 + 3 * 3.0


def test_priorities_decide_between_ready_actions():
    depth = list_schedule(1, 3, COSTS, Priority(DEPTH_FIRST, unit=3), max_live=3)
    breadth = list_schedule(1, 3, COSTS, Priority(BREADTH_FIRST, unit=3), max_live=3)
    units = list_schedule(1, 3, COSTS, Priority(BREADTH_FIRST, unit=2), max_live=3)
    assert " ".join(map(str, depth.actions[0])) == (
        "FE0.0 FF0.0 BF0.0 BE0.0 FE0.1 FF0.1 BF0.1 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"
    )
    assert " ".join(map(str, breadth.actions[0])) == (
        "FE0.0 FE0.1 FE0.2 FF0.0 FF0.1 FF0.2 BF0.0 BF0.1 BF0.2 BE0.0 BE0.1 BE0.2"
    )
    assert " ".join(map(str, units.actions[0])) == (
        "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"
    )


def test_overlap_lets_the_next_unit_in():
    orders = [
        list_schedule(1, 2, COSTS, Priority(BREADTH_FIRST, unit=1, overlap=overlap), max_live=2).actions[0]
        for overlap in (False, True)
    ]
    assert " ".join(map(str, orders[0])) == "FE0.0 FF0.0 BF0.0 BE0.0 FE0.1 FF0.1 BF0.1 BE0.1"
    assert " ".join(map(str, orders[1])) == "FE0.0 FF0.0 FE0.1 FF0.1 BF0.0 BE0.0 BF0.1 BE0.1"


def test_list_schedule_gives_up_at_its_deadline():
    priority = Priority(DEPTH_FIRST, unit=8)
    makespan = list_schedule(4, 8, COSTS, priority, max_live=8).makespan
    assert list_schedule(4, 8, COSTS, priority, max_live=8, deadline=makespan) is None
    assert list_schedule(4, 8, COSTS, priority, max_live=8, deadline=makespan * 1.001).makespan == makespan


def test_list_schedule_times_like_the_simulator():
    found = list_schedule(4, 9, COSTS, Priority(DEPTH_FIRST, unit=3, overlap=True), max_live=6)
    assert simulate(Schedule("list", 4, 9, found.actions), COSTS).makespan == pytest.approx(found.makespan)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    schedule_name, num_ranks, num_microbatches, wave_size = GOLDEN[name]
    schedule = build_schedule(schedule_name, num_ranks, num_microbatches, COSTS, wave_size=wave_size)
    expected = (Path(__file__).parent / "golden" / f"{name}.csv").read_text()
    assert schedule.to_csv() == expected
    assert Schedule.from_csv(expected) == schedule


def test_fused_schedules_defer_nothing():
    for name in ("gpipe", "1f1b-fold", "wavek"):
        assert build_schedule(name, 2, 2, COSTS).phases == {Phase.FE, Phase.FF, Phase.BF, Phase.BE}
