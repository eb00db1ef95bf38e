import pytest

from lightning_januspipe.schedule import (
    Action,
    PhaseCosts,
    Schedule,
    ScheduleError,
    build_schedule,
    simulate,
    validate,
)

ONES = PhaseCosts(1.0, 1.0, 1.0, 1.0)


def _schedule(*orders, num_microbatches=1, placement=()):
    actions = tuple(tuple(map(Action.parse, order.split())) for order in orders)
    return Schedule("hand", len(orders), num_microbatches, actions, placement)


def test_one_rank_has_no_bubble():
    report = simulate(build_schedule("gpipe", 1, 3, ONES), PhaseCosts(1.0, 1.5, 2.5, 1.25), comm=7.0)
    assert report.makespan == report.ideal == 3 * 6.25
    assert report.bubble_fraction == 0.0
    assert report.peak_live == (3,)


def test_one_microbatch_walks_the_chain():
    report = simulate(build_schedule("gpipe", 2, 1, ONES), PhaseCosts(1.0, 2.0, 3.0, 4.0))
    starts = {str(action): time for action, time in report.start.items()}
    assert starts == {
        "FE0.0": 0, "FE1.0": 1, "FF1.0": 2, "FF0.0": 4, "BF0.0": 6, "BF1.0": 9, "BE1.0": 12, "BE0.0": 16
    }  # fmt: skip
    assert report.end[Action.parse("BF1.0")] == 12.0
    assert (report.makespan, report.ideal, report.bubble_fraction) == (20.0, 10.0, 0.5)
    assert report.peak_live == (1, 1)


def test_messages_take_time_between_ranks_only():
    schedule = build_schedule("gpipe", 2, 1, ONES)
    assert simulate(schedule, ONES, comm=0.5).makespan == 8.0 + 4 * 0.5


def test_two_microbatches_overlap():
    report = simulate(build_schedule("gpipe", 2, 2, ONES), ONES)
    ends = [report.end[Action.parse(text)] for text in ("FE1.1", "FF1.1", "FF0.1", "BF0.1", "BF1.1", "BE1.1", "BE0.1")]
    assert ends == [3.0, 5.0, 6.0, 8.0, 9.0, 11.0, 12.0]
    assert (report.makespan, report.ideal, report.peak_live) == (12.0, 8.0, (2, 2))
    assert report.bubble_fraction == pytest.approx(1 / 3)


def test_ranks_may_differ():
    report = simulate(build_schedule("gpipe", 2, 1, ONES), [ONES, PhaseCosts(2.0, 2.0, 2.0, 2.0)])
    assert (report.makespan, report.ideal) == (12.0, 8.0)


def test_deferred_weight_gradients_fill_the_bubble():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0, wf=1.0, we=1.0)
    fused = _schedule("FE0.0 FF0.0 BF0.0 BE0.0", "FE1.0 FF1.0 BF1.0 BE1.0")
    deferred = _schedule("FE0.0 FF0.0 BF0.0 WF0.0 BE0.0 WE0.0", "FE1.0 FF1.0 BF1.0 BE1.0 WF1.0 WE1.0")
    validate(deferred)
    assert simulate(fused, costs).makespan == 12.0
    assert simulate(deferred, costs).makespan == 9.0
    assert simulate(fused, costs).ideal == simulate(deferred, costs).ideal == 6.0


def test_deferral_of_one_of_the_two_phases():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0, wf=0.5, we=0.25)
    report = simulate(_schedule("FE0.0 FF0.0 BF0.0 BE0.0 WF0.0"), costs)
    durations = [report.end[action] - report.start[action] for action in report.end]
    assert durations == [1.0, 1.0, 1.0, 1.25, 0.5]


def test_stages_share_the_costs_of_their_rank():
    orders = ("FE0.0 FE3.0 FF3.0 FF0.0 BF0.0 BF3.0 BE3.0 BE0.0", "FE1.0 FE2.0 FF2.0 FF1.0 BF1.0 BF2.0 BE2.0 BE1.0")
    schedule = _schedule(*orders, placement=(0, 1, 1, 0))
    validate(schedule)
    assert simulate(schedule, ONES).makespan == 16 * 0.5
    assert simulate(schedule, ONES, comm=1.0).makespan == 16 * 0.5 + 8 * 1.0
    assert simulate(schedule, ONES).peak_live == (1, 1)


def test_peak_live_counts_from_fe_to_be():
    order = "FE0.0 FF0.0 BF0.0 FE0.1 BE0.0 FF0.1 BF0.1 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"
    assert simulate(_schedule(order, num_microbatches=3), ONES).peak_live == (2,)


@pytest.mark.parametrize("orders", [("",), ("FE0.0 BF0.0 FF0.0 BE0.0",), ("FF0.0 BF0.0 BE0.0",)])
def test_a_schedule_that_cannot_run_is_refused(orders):
    with pytest.raises(ScheduleError):
        simulate(_schedule(*orders), ONES)


@pytest.mark.parametrize("comm", [-1.0, float("nan"), float("inf")])
def test_comm_must_be_a_latency(comm):
    with pytest.raises(ValueError, match="comm is"):
        simulate(build_schedule("gpipe", 2, 1, ONES), ONES, comm=comm)


def test_costs_must_fit_the_ranks():
    with pytest.raises(ValueError, match="a sequence of 2"):
        simulate(build_schedule("gpipe", 2, 1, ONES), [ONES])
