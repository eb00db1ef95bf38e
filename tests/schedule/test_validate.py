import pickle
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_januspipe.schedule import Action, PhaseCosts, Schedule, ScheduleError, build_schedule, simulate, validate
from lightning_januspipe.schedule.actions import dependencies, predecessor, successor
from lightning_januspipe.schedule.build import GENERATORS

COSTS = PhaseCosts(1.0, 1.3, 2.4, 1.25)


def _schedule(*orders, num_microbatches=1, placement=()):
    actions = tuple(tuple(map(Action.parse, order.split())) for order in orders)
    return Schedule("hand", len(orders), num_microbatches, actions, placement)


def _with_order(schedule, rank, order):
    actions = (*schedule.actions[:rank], tuple(order), *schedule.actions[rank + 1 :])
    return replace(schedule, actions=actions)


@st.composite
def _valid_schedules(draw, min_ranks=1, names=tuple(GENERATORS)):
    num_ranks, num_microbatches = draw(st.integers(min_ranks, 4)), draw(st.integers(1, 6))
    return build_schedule(draw(st.sampled_from(names)), num_ranks, num_microbatches, COSTS, wave_size=2)


def _can_run(schedule, max_pending_sends):
    """Whether a valid set of actions can run: events of all ranks in a graph, which must have no cycle.

    Each action is reached, then ran, then left by its rank.
    """
    before = {}
    for order in schedule.actions:
        for previous, action in zip((None, *order), order, strict=False):
            before[action, "reached"] = {(previous, "left")} if previous else set()
            before[action, "ran"] = {(action, "reached")}
            before[action, "left"] = {(action, "ran")}
            before[action, "ran"] |= {(needed, "ran") for needed in dependencies(action, schedule.num_stages)}
    channels = {}
    for rank, order in enumerate(schedule.actions):
        for action in order:
            if schedule.receiver(action) is not None:
                channels.setdefault((rank, schedule.receiver(action)), []).append(action)
    for (_, receiver), messages in channels.items():
        takers = [successor(message, schedule.num_stages) for message in messages]
        order = schedule.actions[receiver]
        if sorted(takers, key=order.index) != takers:
            return False
        if max_pending_sends is not None:
            for message, taker in zip(messages[max_pending_sends:], takers, strict=False):
                before[message, "left"].add((taker, "reached"))
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return False
    return True


@settings(max_examples=50, deadline=None)
@given(_valid_schedules(), st.sampled_from([None, 0, 1, 2]), st.data())
def test_verdict_agrees_with_a_graph_search(schedule, max_pending_sends, data):
    for _ in range(data.draw(st.integers(0, 2))):
        rank = data.draw(st.integers(0, schedule.num_ranks - 1))
        order = list(schedule.actions[rank])
        first = data.draw(st.integers(0, len(order) - 1))
        second = data.draw(st.integers(0, min(len(order) - 1, first + 3)))
        order[first], order[second] = order[second], order[first]
        schedule = _with_order(schedule, rank, order)
    if _can_run(schedule, max_pending_sends):
        validate(schedule, max_pending_sends=max_pending_sends)
        assert simulate(schedule, COSTS).makespan > 0
    else:
        with pytest.raises(ScheduleError) as caught:
            validate(schedule, max_pending_sends=max_pending_sends)
        error = caught.value
        assert error.action in schedule.actions[error.rank]
        assert f">{error.action}<" in str(error)
        assert f"{error.action} on rank {error.rank}" in str(error)


@settings(max_examples=40, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_missing_action_is_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = list(schedule.actions[rank])
    missing = order.pop(data.draw(st.integers(0, len(order) - 1)))
    with pytest.raises(ScheduleError, match=rf"{missing} is missing on rank {rank}") as caught:
        validate(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (missing, rank)


@settings(max_examples=40, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_repeated_action_is_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = list(schedule.actions[rank])
    repeated = data.draw(st.sampled_from(order))
    order.insert(data.draw(st.integers(0, len(order))), repeated)
    with pytest.raises(ScheduleError, match=rf"{repeated} on rank {rank} is there twice") as caught:
        validate(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (repeated, rank)


@settings(max_examples=40, deadline=None)
@given(_valid_schedules(min_ranks=2), st.data())
def test_an_action_on_another_rank_is_named(schedule, data):
    source = data.draw(st.integers(0, schedule.num_ranks - 1))
    target = data.draw(st.integers(0, schedule.num_ranks - 1).filter(lambda rank: rank != source))
    order, other = list(schedule.actions[source]), list(schedule.actions[target])
    moved = order.pop(data.draw(st.integers(0, len(order) - 1)))
    other.insert(data.draw(st.integers(0, len(other))), moved)
    with pytest.raises(ScheduleError, match=rf"{moved} is on rank {target}, .* rank {source}") as caught:
        validate(_with_order(_with_order(schedule, source, order), target, other))
    assert (caught.value.action, caught.value.rank) == (moved, target)


@settings(max_examples=40, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_broken_dependency_on_a_rank_is_named(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    order = list(schedule.actions[rank])
    late = data.draw(st.sampled_from([action for action in order if action.phase.value != "FE"]))
    needed = next(action for action in dependencies(late, schedule.num_stages) if action in order)
    order.remove(late)
    order.insert(order.index(needed), late)
    with pytest.raises(ScheduleError, match=rf"{late} on rank {rank} comes before {needed}") as caught:
        validate(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (late, rank)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("FE0.0 FF0.0 BF0.0 BE0.0 FE1.0", "stage outside 0 to 0"),
        ("FE0.0 FF0.0 BF0.0 BE0.0 FE0.1", "micro-batch outside 0 to 0"),
        ("FE0.0 FF0.0 WF0.0 BF0.0 BE0.0", "WF0.0 on rank 0 comes before BF0.0"),
        ("FE0.0 FF0.0 BF0.0 WE0.0 BE0.0", "WE0.0 on rank 0 comes before BE0.0"),
    ],
)
def test_other_mistakes_are_named(order, message):
    with pytest.raises(ScheduleError, match=message):
        validate(_schedule(order))


def test_weight_gradients_are_deferred_for_all_or_none():
    validate(_schedule("FE0.0 FF0.0 BF0.0 BE0.0 WF0.0"))
    order = "FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 FE0.1 FF0.1 BF0.1 BE0.1"
    with pytest.raises(ScheduleError, match=r"WF0\.1 is missing on rank 0"):
        validate(_schedule(order, num_microbatches=2))


def test_crossed_messages_are_refused():
    schedule = build_schedule("gpipe", 2, 2, COSTS)
    order = "FE1.1 FE1.0 FF1.0 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"
    crossed = _with_order(schedule, 1, map(Action.parse, order.split()))
    with pytest.raises(ScheduleError, match="cross") as caught:
        validate(crossed)
    assert (str(caught.value.action), caught.value.rank) == ("FE1.1", 1)
    # Matched by content instead of by order the same messages would do.
    assert simulate(crossed, COSTS).makespan > 0


def test_a_cycle_of_waits_is_refused_and_told():
    rank_0 = "FE0.0 FF0.0 FE0.1 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1"
    rank_1 = "FE1.0 FE1.1 FF1.0 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"
    with pytest.raises(ScheduleError) as caught:
        validate(_schedule(rank_0, rank_1, num_microbatches=2))
    message = str(caught.value)
    assert (str(caught.value.action), caught.value.rank) == ("FF0.0", 0)
    assert "rank 0 needs FF1.0 of rank 1 for FF0.0" in message
    assert "rank 1 needs FE0.1 of rank 0 for FE1.1" in message
    assert ">FF0.0<" in message


def test_sends_that_meet_need_a_buffer():
    rank_0 = "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1"
    rank_1 = "FE1.0 FF1.0 FE1.1 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"
    schedule = _schedule(rank_0, rank_1, num_microbatches=2)
    validate(schedule)
    validate(schedule, max_pending_sends=1)
    with pytest.raises(ScheduleError, match=r"rank 0 cannot send the result of FE0\.1 until rank 1 receives more"):
        validate(schedule, max_pending_sends=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 32])
def test_gpipe_runs_with_blocking_sends(num_ranks):
    validate(build_schedule("gpipe", num_ranks, 6, COSTS), max_pending_sends=0)


def test_pending_sends_must_be_a_number():
    with pytest.raises(ValueError, match="max_pending_sends is -1"):
        validate(build_schedule("gpipe", 1, 1, COSTS), max_pending_sends=-1)


def test_long_orders_are_drawn_around_the_failure():
    schedule = build_schedule("gpipe", 2, 30, COSTS)
    order = list(schedule.actions[1])
    order[100], order[10] = order[10], order[100]
    with pytest.raises(ScheduleError) as caught:
        validate(_with_order(schedule, 1, order))
    assert f">{caught.value.action}<" in str(caught.value)
    assert max(map(len, str(caught.value).splitlines()[1:])) < 200


def test_error_survives_pickling():
    with pytest.raises(ScheduleError) as caught:
        validate(_schedule("FE0.0 BF0.0 FF0.0 BE0.0"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.action, copy.rank) == (str(caught.value), caught.value.action, 0)
    assert predecessor(copy.action, 1) == Action.parse("FF0.0")
