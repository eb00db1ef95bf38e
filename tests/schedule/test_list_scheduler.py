import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import COSTS, MEASURED, ONES, phase_costs

from lightning_januspipe.schedule import Phase, PhaseCosts, Schedule, simulate, validate_schedule
from lightning_januspipe.schedule.costs import costs_per_stage
from lightning_januspipe.schedule.list_scheduler import (
    BREADTH_FIRST,
    DEPTH_FIRST,
    PlacedStages,
    Priority,
    list_schedule,
)
from lightning_januspipe.schedule.stage_placement import snake


def _chain(num_ranks, costs=COSTS, chunks=1, latency=0.0):
    num_stages = num_ranks * chunks
    return PlacedStages.folded(
        num_ranks, costs_per_stage(costs, num_ranks, num_stages), snake(num_ranks, num_stages), latency
    )


def _texts(found):
    return [" ".join(map(str, order)) for order in found.actions]


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (Priority(DEPTH_FIRST, 3), "FE0.0 FF0.0 BF0.0 BE0.0 FE0.1 FF0.1 BF0.1 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"),
        (Priority(BREADTH_FIRST, 3), "FE0.0 FE0.1 FE0.2 FF0.0 FF0.1 FF0.2 BF0.0 BF0.1 BF0.2 BE0.0 BE0.1 BE0.2"),
        (Priority(BREADTH_FIRST, 2), "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1 FE0.2 FF0.2 BF0.2 BE0.2"),
    ],
)
def test_priorities_decide_between_ready_actions(priority, expected):
    assert _texts(list_schedule(_chain(1), 3, priority, max_live=3)) == [expected]


def test_overlap_lets_the_next_wave_in():
    orders = [
        _texts(list_schedule(_chain(1), 2, Priority(BREADTH_FIRST, wave_size=1, overlap=overlap), max_live=2))
        for overlap in (False, True)
    ]
    assert orders[0] == ["FE0.0 FF0.0 BF0.0 BE0.0 FE0.1 FF0.1 BF0.1 BE0.1"]
    assert orders[1] == ["FE0.0 FF0.0 FE0.1 FF0.1 BF0.0 BE0.0 BF0.1 BE0.1"]


@pytest.mark.parametrize(
    ("most_deferred", "max_live", "expected"),
    [
        (None, 2, "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1 WF0.0 WE0.0 WF0.1 WE0.1"),
        (0, 2, "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 WF0.0 BF0.1 WF0.1 BE0.0 WE0.0 BE0.1 WE0.1"),
        (1, 2, "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 WF0.0 BE0.0 WE0.0 BE0.1 WF0.1 WE0.1"),
        (None, 1, "FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 WE0.0 FE0.1 FF0.1 BF0.1 BE0.1 WF0.1 WE0.1"),
    ],
)
def test_weight_gradients_come_last_or_when_too_many_are_owed(most_deferred, max_live, expected):
    priority = Priority(BREADTH_FIRST, 2, most_deferred=most_deferred)
    assert _texts(list_schedule(_chain(1, MEASURED), 2, priority, max_live, deferred=True)) == [expected]


def test_rounding_does_not_decide():
    """Actions that end at the same time up to rounding are as good as simultaneous."""
    exact = list_schedule(_chain(4, ONES), 8, Priority(DEPTH_FIRST, 8), max_live=4)
    tenths = list_schedule(_chain(4, PhaseCosts(0.1, 0.1, 0.1, 0.1)), 8, Priority(DEPTH_FIRST, 8), max_live=4)
    assert exact.actions == tenths.actions


def test_it_gives_up_at_its_deadline():
    priority = Priority(DEPTH_FIRST, wave_size=8)
    makespan = list_schedule(_chain(4), 8, priority, max_live=8).makespan
    assert list_schedule(_chain(4), 8, priority, max_live=8, deadline=makespan) is None
    assert list_schedule(_chain(4), 8, priority, max_live=8, deadline=makespan * 1.001).makespan == makespan


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    phase_costs,
    st.integers(1, 3),
    st.floats(0.0, 1.0),
    st.permutations(list(Phase)[:4]),
    st.tuples(st.integers(1, 9), st.booleans(), st.none() | st.integers(0, 3)),
    st.integers(1, 10),
    st.booleans(),
)
def test_any_priority_gives_a_valid_order_and_its_time(
    num_ranks, num_microbatches, costs, chunks, latency, phases, shape, max_live, deferred
):
    chain = _chain(num_ranks, costs, chunks, latency)
    found = list_schedule(chain, num_microbatches, Priority(tuple(phases), *shape), max_live, deferred=deferred)
    schedule = Schedule("list", num_ranks, num_microbatches, found.actions, chain.placement)
    validate_schedule(schedule)
    report = simulate(schedule, costs, comm=latency)
    assert report.makespan <= found.makespan * (1 + 1e-9)
    assert max(report.peak_live) <= max_live


@pytest.mark.parametrize("max_live", [1, 2, 3])
def test_a_rank_behind_with_its_weight_gradients_keeps_the_cap(max_live):
    """The first rank lets micro-batches in as it finishes them, faster than the second one does their weights."""
    costs = [PhaseCosts(1.0, 1.0, 1.0, 1.0, 0.1, 0.1), PhaseCosts(1.0, 1.0, 1.0, 1.0, 3.0, 3.0)]
    chain = PlacedStages.folded(2, costs, (0, 1), 0.0)
    found = list_schedule(chain, 8, Priority(DEPTH_FIRST, 8), max_live, deferred=True)
    assert simulate(Schedule("list", 2, 8, found.actions), costs).peak_live == (max_live, max_live)
