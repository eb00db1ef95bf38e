import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import (
    MEASURED,
    NAMES,
    ONES,
    memory_costs,
    phase_costs,
    rank_of,
    requests,
    schedule_of,
    start_times,
)

from lightning_januspipe.schedule import (
    Action,
    Link,
    MemoryCosts,
    Phase,
    PhaseCosts,
    ScheduleError,
    build_schedule,
    simulate,
    validate_schedule,
)
from lightning_januspipe.schedule.costs import memory_per_stage


def _starts(report):
    return {str(action): time for action, time in report.start.items()}


def test_one_rank_has_no_bubble():
    report = simulate(build_schedule("gpipe", 1, 3, ONES), PhaseCosts(1.0, 1.5, 2.5, 1.25), comm=7.0)
    assert report.makespan == report.ideal == 3 * 6.25
    assert report.bubble_fraction == 0.0
    assert report.peak_live == (3,)
    assert report.busy == (3 * 6.25,)


def test_one_microbatch_walks_the_chain():
    report = simulate(build_schedule("gpipe", 2, 1, ONES), PhaseCosts(1.0, 2.0, 3.0, 4.0))
    assert _starts(report) == {
        "FE0.0": 0, "FE1.0": 1, "FF1.0": 2, "FF0.0": 4, "BF0.0": 6, "BF1.0": 9, "BE1.0": 12, "BE0.0": 16
    }  # fmt: skip
    assert report.end[Action.parse("BF1.0")] == 12.0
    assert (report.makespan, report.ideal, report.bubble_fraction) == (20.0, 10.0, 0.5)
    assert report.peak_live == (1, 1)


def test_two_ranks_two_microbatches_with_latency():
    rank_0 = "FE0.0 FE0.1 FF0.0 BF0.0 FF0.1 BF0.1 BE0.0 BE0.1"
    rank_1 = "FE1.0 FF1.0 FE1.1 FF1.1 BF1.0 BE1.0 BF1.1 BE1.1"
    schedule = schedule_of(rank_0, rank_1, num_microbatches=2)
    report = simulate(schedule, PhaseCosts(1.0, 2.0, 3.0, 1.0), comm=0.5)
    assert _starts(report) == {
        "FE0.0": 0, "FE0.1": 1, "FF0.0": 5, "BF0.0": 7, "FF0.1": 10, "BF0.1": 12, "BE0.0": 15, "BE0.1": 20,
        "FE1.0": 1.5, "FF1.0": 2.5, "FE1.1": 4.5, "FF1.1": 5.5,
        "BF1.0": 10.5, "BE1.0": 13.5, "BF1.1": 15.5, "BE1.1": 18.5,
    }  # fmt: skip
    assert (report.makespan, report.ideal, report.peak_live) == (21.0, 14.0, (2, 2))


def test_messages_take_time_between_ranks_only():
    schedule = build_schedule("gpipe", 2, 1, ONES)
    assert simulate(schedule, ONES, comm=0.5).makespan == 8.0 + 4 * 0.5
    assert simulate(schedule, ONES, comm=Link(latency=0.5)).makespan == 8.0 + 4 * 0.5


def test_messages_of_one_direction_queue_up():
    link = Link(latency=0.25, bandwidth=2.0, message_bytes=10.0)
    starts = _starts(simulate(build_schedule("gpipe", 2, 3, ONES), ONES, comm=link))
    # They leave rank 0 at 1, 2 and 3, and each keeps the channel for 5.
    assert [starts[f"FE1.{m}"] for m in range(3)] == [6.25, 11.25, 16.25]
    # The other direction is free: FF1 ends at 18.25, 19.25, 20.25.
    assert [starts[f"FF0.{m}"] for m in range(3)] == [23.5, 28.5, 33.5]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES).flatmap(lambda name: requests(name, 4, 5)), st.floats(0, 2), st.floats(0, 2))
def test_times_agree_with_their_definition(request, latency, occupied):
    (name, num_ranks, num_microbatches, costs), options = request
    schedule = build_schedule(name, num_ranks, num_microbatches, costs, **options)
    report = simulate(schedule, costs, comm=Link(latency, 1.0, occupied))
    durations = {action: report.end[action] - report.start[action] for action in report.end}
    expected = start_times(schedule, durations.__getitem__, latency, occupied)
    assert report.start == pytest.approx(expected)
    for rank, order in enumerate(schedule.actions):
        assert report.busy[rank] == pytest.approx(sum(durations[action] for action in order))


def test_ranks_may_differ():
    report = simulate(build_schedule("gpipe", 2, 1, ONES), [ONES, PhaseCosts(2.0, 2.0, 2.0, 2.0)])
    assert (report.makespan, report.ideal) == (12.0, 8.0)
    assert report.bubble_fraction == pytest.approx(1 / 3)


def test_deferred_weight_gradients_fill_the_bubble():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0, wf=1.0, we=1.0)
    fused = schedule_of("FE0.0 FF0.0 BF0.0 BE0.0", "FE1.0 FF1.0 BF1.0 BE1.0")
    deferred = schedule_of("FE0.0 FF0.0 BF0.0 WF0.0 BE0.0 WE0.0", "FE1.0 FF1.0 BF1.0 BE1.0 WF1.0 WE1.0")
    validate_schedule(deferred)
    assert simulate(fused, costs).makespan == 12.0
    assert simulate(deferred, costs).makespan == 9.0
    assert simulate(fused, costs).ideal == simulate(deferred, costs).ideal == 6.0


def test_split_stages_compute_the_energies_once_more():
    schedule = schedule_of("FE0.0 BE0.0", "FF0.0 BF0.0", placement=(0,), force_placement=(1,))
    validate_schedule(schedule)
    report = simulate(schedule, PhaseCosts(1.0, 2.0, 4.0, 8.0, wf=16.0, we=32.0), comm=0.5)
    # One rank's share is half of the only stage.
    lengths = {str(action): (report.end[action] - report.start[action]) / 2 for action in report.end}
    assert lengths == {"FE0.0": 1.0, "FF0.0": 1.0 + 2.0, "BF0.0": (4.0 + 16.0) + (8.0 + 32.0), "BE0.0": 8.0 + 32.0}
    assert report.makespan == 2 * (1 + 3 + 60 + 40) + 2 * 0.5
    assert (report.ideal, report.busy) == (63.0, (82.0, 126.0))


def test_a_split_stage_has_two_messages_on_a_channel():
    # FE0 sends to FE1 and to FF0, both on rank 1; each keeps the channel for 1.
    schedule = schedule_of(
        "FE0.0 BE0.0", "FE1.0 FF1.0 FF0.0 BF0.0 BF1.0 BE1.0", placement=(0, 1), force_placement=(1, 1)
    )
    validate_schedule(schedule)
    starts = _starts(simulate(schedule, ONES, comm=Link(0.0, 1.0, 1.0)))
    assert starts["FE1.0"] == 2.0
    assert starts["BE0.0"] == 2 + 1 + 1 + 2 + 2 + 1 + 1 + 1


def test_stages_share_the_costs_of_their_rank():
    orders = ("FE0.0 FE3.0 FF3.0 FF0.0 BF0.0 BF3.0 BE3.0 BE0.0", "FE1.0 FE2.0 FF2.0 FF1.0 BF1.0 BF2.0 BE2.0 BE1.0")
    schedule = schedule_of(*orders, placement=(0, 1, 1, 0))
    validate_schedule(schedule)
    assert simulate(schedule, ONES).makespan == 16 * 0.5
    assert simulate(schedule, ONES, comm=1.0).makespan == 16 * 0.5 + 8 * 1.0
    assert simulate(schedule, ONES).peak_live == (1, 1)


def test_peak_live_counts_from_fe_to_the_last_action():
    order = "FE0.0 FF0.0 BF0.0 FE0.1 BE0.0 FF0.1 BF0.1 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"
    assert simulate(schedule_of(order, num_microbatches=3), ONES).peak_live == (2,)
    order = "FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 FE0.1 FF0.1 BF0.1 BE0.1 WE0.0 WF0.1 WE0.1"
    assert simulate(schedule_of(order, num_microbatches=2), ONES).peak_live == (2,)


def test_memory_of_one_microbatch():
    memory = MemoryCosts(energy=4.0, force=2.0, kept=1.0)
    folded = simulate(schedule_of("FE0.0 FF0.0 BF0.0 BE0.0"), ONES, memory=memory)
    assert folded.memory == (((0.0, 0.0), (0.0, 4.0), (1.0, 6.0), (2.0, 7.0), (3.0, 5.0), (4.0, 0.0)),)
    assert folded.peak_memory == (7.0,)
    deferred = simulate(schedule_of("FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 WE0.0"), MEASURED, memory=memory)
    assert [held for _, held in deferred.memory[0]] == [0.0, 4.0, 6.0, 7.0, 5.0, 0.0]
    split = schedule_of("FE0.0 BE0.0", "FF0.0 BF0.0", placement=(0,), force_placement=(1,))
    assert simulate(split, ONES, memory=memory).peak_memory == (8.0, 12.0)
    assert simulate(split, ONES).memory == ()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 5), phase_costs, memory_costs, st.data())
def test_memory_agrees_with_a_count(name, num_ranks, num_microbatches, costs, memory, data):
    schedule = build_schedule(name, num_ranks, num_microbatches, costs)
    report = simulate(schedule, costs, memory=memory)
    share = memory_per_stage(memory, num_ranks, schedule.num_stages)[0]
    assert share.energy == pytest.approx(memory.energy * num_ranks / schedule.num_stages)
    assert [max(held for _, held in curve) for curve in report.memory] == list(report.peak_memory)
    last = {Phase.BF: Phase.WF, Phase.BE: Phase.WE} if name == "wavek-zb" else {}
    lives = []
    for stage in range(schedule.num_stages):
        for m in range(num_microbatches):
            fe, ff, bf, be = (Action(phase, stage, m) for phase in (Phase.FE, Phase.FF, Phase.BF, Phase.BE))
            energies_end = report.end[Action(last.get(Phase.BE, Phase.BE), stage, m)]
            forces_end = report.end[Action(last.get(Phase.BF, Phase.BF), stage, m)]
            here, there = rank_of(schedule, be), rank_of(schedule, bf)
            lives.append((here, report.start[fe], energies_end, share.energy))
            lives.append((there, report.start[ff], forces_end, share.force))
            if here == there:
                lives.append((here, report.start[bf], energies_end, share.kept))
            else:
                lives.append((there, report.start[ff], forces_end, share.energy))
    for rank in range(num_ranks):
        moment = data.draw(st.floats(0.0, 1.0)) * report.makespan
        moments = [moment, *(report.start[a] / 2 + report.end[a] / 2 for a in schedule.actions[rank])]
        for time in moments:
            held = sum(size for r, begin, end, size in lives if r == rank and begin <= time < end)
            drawn = [value for begin, value in report.memory[rank] if begin <= time][-1]
            if time != moment or all(abs(time - begin) > 1e-6 for begin, _ in report.memory[rank]):
                assert drawn == pytest.approx(held, abs=1e-6)


@pytest.mark.parametrize(
    "orders", [("",), ("FE0.0 BF0.0 FF0.0 BE0.0",), ("FF0.0 BF0.0 BE0.0",), ("FE0.0 FE0.0",), ("FE1.0",)]
)
def test_a_schedule_that_cannot_run_is_refused(orders):
    with pytest.raises(ScheduleError):
        simulate(schedule_of(*orders), ONES)


@pytest.mark.parametrize("comm", [-1.0, float("nan"), float("inf")])
def test_comm_must_be_a_latency(comm):
    with pytest.raises(ValueError, match="comm is"):
        simulate(build_schedule("gpipe", 2, 1, ONES), ONES, comm=comm)


def test_costs_must_fit_the_ranks():
    with pytest.raises(ValueError, match="a sequence of 2"):
        simulate(build_schedule("gpipe", 2, 1, ONES), [ONES])


def test_microbatches_of_their_own_weights() -> None:
    costs = PhaseCosts(1.0, 2.0, 3.0, 1.0)
    schedule = build_schedule("1f1b-fold", 2, 3, costs)
    plain = simulate(schedule, costs)
    assert simulate(schedule, costs, weights=[2.0] * 3).makespan == pytest.approx(2 * plain.makespan)
    uneven = simulate(schedule, costs, weights=[1.0, 4.0, 1.0])
    for action, start in uneven.start.items():
        lasted = (uneven.end[action] - start) / (plain.end[action] - plain.start[action])
        assert lasted == pytest.approx(4.0 if action.microbatch == 1 else 1.0)
    assert uneven.ideal == pytest.approx(2 * plain.ideal) and sum(uneven.busy) == pytest.approx(2 * sum(plain.busy))
    for wrong in ([1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(ValueError, match="expected 3 positive numbers"):
            simulate(schedule, costs, weights=wrong)
