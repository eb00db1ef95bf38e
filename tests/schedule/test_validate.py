import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import COSTS, MEASURED, NAMES, actions, can_execute, schedule_of, waits_for

from lightning_januspipe.schedule import Action, ScheduleError, build_schedule, simulate, validate_schedule
from lightning_januspipe.schedule.actions import COMPUTED_PHASES, predecessor

VERDICTS = settings(max_examples=250, deadline=None)


def _with_order(schedule, rank, order):
    return replace(schedule, actions=(*schedule.actions[:rank], tuple(order), *schedule.actions[rank + 1 :]))


@st.composite
def _valid_schedules(draw, min_ranks=1, names=NAMES):
    num_ranks, num_microbatches = draw(st.integers(min_ranks, 4)), draw(st.integers(1, 6))
    return build_schedule(draw(st.sampled_from(names)), num_ranks, num_microbatches, MEASURED, wave_size=2, max_live=6)


def _pick(draw, schedule):
    """A rank that has actions, and a place in its order."""
    rank = draw(st.sampled_from([rank for rank, order in enumerate(schedule.actions) if order]))
    return rank, draw(st.integers(0, len(schedule.actions[rank]) - 1))


@st.composite
def _corrupted(draw):
    """A valid schedule with one mistake, the actions that it concerns, and the ranks that it touches."""
    schedule = draw(_valid_schedules())
    rank, place = _pick(draw, schedule)
    order = list(schedule.actions[rank])
    action = order[place]
    kind = draw(st.sampled_from(["swap", "move", "early", "drop", "repeat", "exile", "change"]))
    concerned, ranks = {action}, {rank}
    if kind == "swap":
        other = draw(st.integers(0, len(order) - 1) | st.just(min(place + 1, len(order) - 1)))
        order[place], order[other] = order[other], order[place]
        concerned.add(order[place])
    elif kind == "move":
        order.insert(draw(st.integers(0, len(order) - 1)), order.pop(place))
    elif kind == "early":
        # Right before something of its own rank that it depends on: WE before WF, BF before FF, ...
        needed = [n for n in waits_for(action, schedule.num_stages) if n in order]
        if needed:
            order.insert(order.index(draw(st.sampled_from(sorted(needed)))), order.pop(place))
    elif kind == "drop":
        del order[place]
    elif kind == "repeat":
        order.insert(draw(st.integers(0, len(order))), action)
    elif kind == "exile":
        del order[place]
        target = draw(st.integers(0, schedule.num_ranks - 1))
        schedule = _with_order(schedule, rank, order)
        order = list(schedule.actions[target])
        order.insert(draw(st.integers(0, len(order))), action)
        rank = target
        ranks.add(target)
    else:
        changed = draw(
            st.sampled_from(
                [
                    action._replace(phase=draw(st.sampled_from(COMPUTED_PHASES))),
                    action._replace(stage=draw(st.integers(-1, schedule.num_stages))),
                    action._replace(microbatch=draw(st.integers(-1, schedule.num_microbatches))),
                ]
            )
        )
        order[place] = changed
        concerned.add(changed)
    return _with_order(schedule, rank, order), concerned, ranks


@VERDICTS
@given(_corrupted(), st.sampled_from([None, 0, 1, 2]), st.integers(0, 2**32))
def test_one_mistake_is_refused_by_name_or_harmless(corrupted, max_pending_sends, seed):
    schedule, concerned, ranks = corrupted
    try:
        validate_schedule(schedule, max_pending_sends=max_pending_sends)
    except ScheduleError as error:
        told = str(error).splitlines()[0]
        assert f"{error.action}" in told and f">{error.action}<" in str(error)
        # The mistake is named, or the cycle of waits that is told goes through the rank that has it.
        is_named = any(str(action) in told for action in concerned)
        in_cycle = "waits for itself" in told and any(f"rank {rank} " in told for rank in ranks)
        assert is_named or in_cycle or max_pending_sends is not None
        if "is missing" not in told and max_pending_sends is None:
            with pytest.raises(ScheduleError):
                simulate(schedule, MEASURED)
    else:
        assert can_execute(schedule, max_pending_sends, seed)
        assert len(simulate(schedule, MEASURED).end) == sum(map(len, schedule.actions))


@VERDICTS
@given(_valid_schedules(), st.sampled_from([None, 0, 1, 2]), st.data(), st.integers(0, 2**32))
def test_verdict_agrees_with_an_execution(schedule, max_pending_sends, data, seed):
    """With a few actions displaced, and channels of any size."""
    for _ in range(data.draw(st.integers(0, 2))):
        rank, first = _pick(data.draw, schedule)
        order = list(schedule.actions[rank])
        second = data.draw(st.integers(0, min(len(order) - 1, first + 3)))
        order[first], order[second] = order[second], order[first]
        schedule = _with_order(schedule, rank, order)
    if can_execute(schedule, max_pending_sends, seed):
        validate_schedule(schedule, max_pending_sends=max_pending_sends)
        assert simulate(schedule, MEASURED).makespan > 0
    else:
        with pytest.raises(ScheduleError) as caught:
            validate_schedule(schedule, max_pending_sends=max_pending_sends)
        error = caught.value
        assert error.action in schedule.actions[error.rank]
        assert f"{error.action} on rank {error.rank}" in str(error)


@settings(max_examples=30, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_missing_action_is_named(schedule, data):
    rank, place = _pick(data.draw, schedule)
    order = list(schedule.actions[rank])
    missing = order.pop(place)
    with pytest.raises(ScheduleError, match=rf"{missing} is missing on rank {rank}") as caught:
        validate_schedule(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (missing, rank)


@settings(max_examples=30, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_repeated_action_is_named(schedule, data):
    rank, place = _pick(data.draw, schedule)
    order = list(schedule.actions[rank])
    repeated = order[place]
    order.insert(data.draw(st.integers(0, len(order))), repeated)
    with pytest.raises(ScheduleError, match=rf"{repeated} on rank {rank} is there twice") as caught:
        validate_schedule(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (repeated, rank)


@settings(max_examples=30, deadline=None)
@given(_valid_schedules(min_ranks=2), st.data())
def test_an_action_on_another_rank_is_named(schedule, data):
    source, place = _pick(data.draw, schedule)
    target = data.draw(st.integers(0, schedule.num_ranks - 1).filter(lambda rank: rank != source))
    order, other = list(schedule.actions[source]), list(schedule.actions[target])
    moved = order.pop(place)
    other.insert(data.draw(st.integers(0, len(other))), moved)
    exiled = _with_order(_with_order(schedule, source, order), target, other)
    for check in (validate_schedule, lambda schedule: simulate(schedule, MEASURED)):
        with pytest.raises(ScheduleError, match=rf"{moved} is on rank {target}, .* rank {source}") as caught:
            check(exiled)
        assert (caught.value.action, caught.value.rank) == (moved, target)


@settings(max_examples=30, deadline=None)
@given(_valid_schedules(), st.data())
def test_a_broken_dependency_on_a_rank_is_named(schedule, data):
    rank, _ = _pick(data.draw, schedule)
    order = list(schedule.actions[rank])
    local = {a: [n for n in schedule.dependencies(a) if n in order] for a in order}
    candidates = [action for action, needed in local.items() if needed]
    if not candidates:
        return
    late = data.draw(st.sampled_from(candidates))
    needed = min(local[late], key=order.index)
    order.remove(late)
    order.insert(order.index(needed), late)
    with pytest.raises(ScheduleError, match=rf"{late} on rank {rank} comes before") as caught:
        validate_schedule(_with_order(schedule, rank, order))
    assert (caught.value.action, caught.value.rank) == (late, rank)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("FE0.0 FF0.0 BF0.0 BE0.0 FE1.0", "stage outside 0 to 0"),
        ("FE0.0 FF0.0 BF0.0 BE0.0 FE0.1", "micro-batch outside 0 to 0"),
        ("FE0.0 FF0.0 WF0.0 BF0.0 BE0.0 WE0.0", "WF0.0 on rank 0 comes before BF0.0"),
        ("FE0.0 FF0.0 BF0.0 WF0.0 WE0.0 BE0.0", "WE0.0 on rank 0 comes before BE0.0"),
        ("FE0.0 FF0.0 BF0.0 BE0.0 WE0.0 WF0.0", "WE0.0 on rank 0 comes before WF0.0"),
        ("FE0.0 BF0.0 FF0.0 BE0.0", "BF0.0 on rank 0 comes before FF0.0"),
    ],
)
def test_other_mistakes_are_named(order, message):
    with pytest.raises(ScheduleError, match=message):
        validate_schedule(schedule_of(order))


def test_weight_gradients_are_deferred_for_all_or_none():
    validate_schedule(schedule_of("FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 WE0.0"))
    with pytest.raises(ScheduleError, match=r"WE0\.0 is missing on rank 0"):
        validate_schedule(schedule_of("FE0.0 FF0.0 BF0.0 BE0.0 WF0.0"))
    order = "FE0.0 FF0.0 BF0.0 BE0.0 WF0.0 WE0.0 FE0.1 FF0.1 BF0.1 BE0.1"
    with pytest.raises(ScheduleError, match=r"WF0\.1 is missing on rank 0"):
        validate_schedule(schedule_of(order, num_microbatches=2))


def test_only_folded_stages_defer():
    split = schedule_of("FE0.0 BE0.0", "FF0.0 BF0.0", placement=(0,), force_placement=(1,))
    validate_schedule(split)
    deferred = schedule_of("FE0.0 BE0.0 WE0.0", "FF0.0 BF0.0 WF0.0", placement=(0,), force_placement=(1,))
    with pytest.raises(ScheduleError, match=r"WE0\.0 on rank 0 .* only folded stages can defer"):
        validate_schedule(deferred)


def test_messages_may_cross():
    schedule = build_schedule("gpipe", 2, 2, COSTS)
    crossed = _with_order(schedule, 1, actions("FE1.1 FE1.0 FF1.0 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"))
    validate_schedule(crossed)
    # The receives are posted in the sender's order: FE0.0 is received before FE0.1, though it is used later.
    validate_schedule(crossed, max_pending_sends=1)
    assert simulate(crossed, COSTS).makespan > simulate(schedule, COSTS).makespan


def test_a_cycle_of_waits_is_refused_and_told():
    rank_0 = "FE0.0 FF0.0 FE0.1 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1"
    rank_1 = "FE1.0 FE1.1 FF1.0 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"
    with pytest.raises(ScheduleError) as caught:
        validate_schedule(schedule_of(rank_0, rank_1, num_microbatches=2))
    message = str(caught.value)
    assert (str(caught.value.action), caught.value.rank) == ("FF0.0", 0)
    assert "rank 0 needs FF1.0 of rank 1 for FF0.0" in message
    assert "rank 1 needs FE0.1 of rank 0 for FE1.1" in message
    assert ">FF0.0<" in message


def test_sends_that_meet_need_a_buffer():
    rank_0 = "FE0.0 FE0.1 FF0.0 FF0.1 BF0.0 BF0.1 BE0.0 BE0.1"
    rank_1 = "FE1.0 FF1.0 FE1.1 FF1.1 BF1.0 BF1.1 BE1.0 BE1.1"
    schedule = schedule_of(rank_0, rank_1, num_microbatches=2)
    validate_schedule(schedule)
    validate_schedule(schedule, max_pending_sends=1)
    with pytest.raises(ScheduleError, match=r"rank 0 cannot send the result of FE0\.1 until rank 1 receives more"):
        validate_schedule(schedule, max_pending_sends=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 32])
def test_gpipe_runs_with_blocking_sends(num_ranks):
    validate_schedule(build_schedule("gpipe", num_ranks, 6, COSTS), max_pending_sends=0)


def test_pending_sends_must_be_a_number():
    with pytest.raises(ValueError, match="max_pending_sends is -1"):
        validate_schedule(build_schedule("gpipe", 1, 1, COSTS), max_pending_sends=-1)


def test_long_orders_are_drawn_around_the_failure():
    schedule = build_schedule("gpipe", 2, 30, COSTS)
    order = list(schedule.actions[1])
    order[100], order[10] = order[10], order[100]
    with pytest.raises(ScheduleError) as caught:
        validate_schedule(_with_order(schedule, 1, order))
    assert f">{caught.value.action}<" in str(caught.value)
    assert max(map(len, str(caught.value).splitlines()[1:])) < 200


def test_error_survives_pickling():
    with pytest.raises(ScheduleError) as caught:
        validate_schedule(schedule_of("FE0.0 BF0.0 FF0.0 BE0.0"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.action, copy.rank) == (str(caught.value), caught.value.action, 0)
    assert predecessor(copy.action, 1) == Action.parse("FF0.0")
