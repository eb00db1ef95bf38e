import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_models import actions, messages_from, schedule_of

from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.actions import (
    COMPUTED_PHASES,
    CRITICAL_PHASES,
    STATE_CHANGES,
    WHOLE_STEP,
    Message,
    dependencies,
    predecessor,
    successor,
)

ACTIONS = st.builds(Action, st.sampled_from(COMPUTED_PHASES), st.integers(0, 40), st.integers(0, 200)) | st.builds(
    Action, st.sampled_from(STATE_CHANGES), st.integers(0, 40), st.just(WHOLE_STEP)
)


@st.composite
def _schedules(draw):
    num_ranks = draw(st.integers(1, 4))
    orders = draw(st.lists(st.lists(ACTIONS, max_size=6), min_size=num_ranks, max_size=num_ranks))
    placement = draw(st.lists(st.integers(0, num_ranks - 1), max_size=6))
    num_stages = len(placement) or num_ranks
    forces = st.lists(st.integers(0, num_ranks - 1), min_size=num_stages, max_size=num_stages)
    force_placement = draw(st.just([]) | forces)
    return Schedule("some-name, 2", num_ranks, draw(st.integers(1, 9)), orders, placement, force_placement)


@given(ACTIONS)
def test_action_text_round_trips(action):
    assert Action.parse(str(action)) == action


def test_action_text_is_compact():
    assert str(Action(Phase.FE, 0, 3)) == "FE0.3"
    assert Action.parse(" WE12.30 ") == Action(Phase.WE, 12, 30)
    assert str(Action(Phase.REDUCE, 3, WHOLE_STEP)) == "REDUCE3"


@pytest.mark.parametrize(
    "text", ["", "FE", "FE0", "FE0.", "XX0.1", "FE-1.0", "fe0.1", "FE0.1.2", "FE 0.1", "REDUCE0.1", "REDUCE"]
)
def test_action_parse_refuses_other_text(text):
    with pytest.raises(ValueError, match=r"FE0\.3"):
        Action.parse(text)


def test_chain_of_a_microbatch():
    action, chain = Action(Phase.FE, 0, 5), []
    while action is not None:
        chain.append(str(action))
        action = successor(action, 3)
    assert " ".join(chain) == "FE0.5 FE1.5 FE2.5 FF2.5 FF1.5 FF0.5 BF0.5 BF1.5 BF2.5 BE2.5 BE1.5 BE0.5"


@given(st.integers(1, 6), st.data())
def test_predecessor_inverts_successor(num_stages, data):
    action = Action(data.draw(st.sampled_from(CRITICAL_PHASES)), data.draw(st.integers(0, num_stages - 1)), 0)
    after = successor(action, num_stages)
    assert after is None or predecessor(after, num_stages) == action


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("FE0.1", ""),
        ("FE2.1", "FE1.1"),
        ("FF2.1", "FE2.1"),
        ("FF0.1", "FF1.1 FE0.1"),
        ("BF0.1", "FF0.1"),
        ("BF1.1", "BF0.1 FF1.1"),
        ("BE2.1", "BF2.1"),
        ("BE1.1", "BE2.1 BF1.1"),
        ("WF1.1", "BF1.1"),
        ("WE1.1", "BE1.1 WF1.1"),
    ],
)
def test_dependencies(action, expected):
    assert dependencies(Action.parse(action), num_stages=3) == actions(expected)


def test_deferred_phases_are_off_the_chain():
    for phase in (Phase.WF, Phase.WE):
        assert predecessor(Action(phase, 1, 0), 3) is None
        assert successor(Action(phase, 1, 0), 3) is None


@given(_schedules())
def test_schedule_round_trips(schedule):
    assert Schedule.from_csv(schedule.to_csv()) == schedule
    assert Schedule.parse(str(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_schedule_text_and_csv():
    schedule = Schedule("tiny", 1, 1, (actions("FE0.0 FF0.0 BF0.0 BE0.0"),))
    assert str(schedule) == "tiny: 1 micro-batches, stages on ranks 0\nrank 0: FE0.0 FF0.0 BF0.0 BE0.0"
    assert schedule.to_csv() == "name,tiny\nnum_microbatches,1\nplacement,0\n0,FE0.0,FF0.0,BF0.0,BE0.0\n"


def test_text_and_csv_of_split_stages():
    schedule = schedule_of("FE0.0 BE0.0", "FF0.0 BF0.0", placement=(0,), force_placement=(1,))
    assert str(schedule).splitlines()[0] == "hand: 1 micro-batches, stages on ranks 0, forces on ranks 1"
    assert schedule.to_csv().splitlines()[2:4] == ["placement,0", "force_placement,1"]
    assert Schedule.parse(str(schedule)) == Schedule.from_csv(schedule.to_csv()) == schedule


@pytest.mark.parametrize("text", ["", "nonsense", "a: 1 micro-batches, stages on ranks 0\nrank 1: FE0.0"])
def test_schedule_parse_refuses_other_text(text):
    with pytest.raises(ValueError, match="expected"):
        Schedule.parse(text)


@pytest.mark.parametrize("text", ["", "name,a\nplacement,0\n", "name,a\nnum_microbatches,1\nplacement,0\n1,FE0.0\n"])
def test_schedule_from_csv_refuses_other_text(text):
    with pytest.raises(ValueError, match="expected"):
        Schedule.from_csv(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", 0, 1, ()), "at least one rank"),
        (("a", 1, 0, ((),)), "at least one rank and one micro-batch"),
        (("a", 2, 1, ((),)), "actions for 1 ranks"),
        (("a", 1, 1, ((),), (1,)), "ranks outside 0 to 0"),
        (("a", 2, 1, ((), ()), (0,), (2,)), "ranks outside 0 to 1"),
        (("a", 2, 1, ((), ()), (0, 1), (0,)), "force_placement names 1 stages, expected 2"),
        (("a: b", 1, 1, ((),)), "without a colon"),
    ],
)
def test_schedule_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def _targets(schedule, text):
    return [str(message.target) for message in schedule.sent(Action.parse(text))]


def test_messages_of_two_stages_per_rank():
    schedule = Schedule("snake", 2, 1, ((), ()), (0, 1, 1, 0))
    assert _targets(schedule, "FE0.0") == ["FE1.0"]
    assert schedule.received(Action.parse("FE1.0")) == (Message(*actions("FE0.0 FE1.0")),)
    # Where the chain turns, and at the folds, nothing is sent.
    for text in ("FE1.0", "FE3.0", "FF0.0", "BF3.0", "BE0.0", "WF1.0", "WE1.0"):
        assert _targets(schedule, text) == []
    assert schedule.received(Action.parse("FE2.0")) == schedule.received(Action.parse("WE1.0")) == ()
    assert _targets(schedule, "FF3.0") == ["FF2.0"]
    assert (schedule.is_folded, schedule.stages_of(1)) == (True, (1, 2))


def test_messages_of_split_stages():
    schedule = Schedule("split", 3, 1, ((), (), ()), (0, 1, 2), (2, 1, 2))
    assert [schedule.is_split(stage) for stage in range(3)] == [True, False, False]
    assert [schedule.stages_of(rank) for rank in range(3)] == [(0,), (1,), (0, 2)]
    # FE hands its boundary on along the chain, and to FF of its own stage; BF to BE likewise.
    assert _targets(schedule, "FE0.0") == ["FE1.0", "FF0.0"]
    assert _targets(schedule, "BF0.0") == ["BF1.0", "BE0.0"]
    assert _targets(schedule, "FF0.0") == []
    received = schedule.received(Action.parse("FF0.0"))
    assert [str(message.source) for message in received] == ["FF1.0", "FE0.0"]
    assert schedule.rank_of(Action.parse("FF0.0")) == 2 and schedule.rank_of(Action.parse("BE0.0")) == 0


@given(_schedules())
def test_what_is_sent_is_what_is_received(schedule):
    stages = range(schedule.num_stages)
    chain = [Action(phase, stage, 3) for phase in CRITICAL_PHASES for stage in stages]
    sent = [message for action in chain for message in schedule.sent(action)]
    received = [message for action in chain for message in schedule.received(action)]
    assert sorted(sent) == sorted(received)
    for action in chain:
        targets = [(schedule.rank_of(target), target) for _, target in schedule.sent(action)]
        assert targets == messages_from(schedule, action)


def test_messages_are_listed_by_channel_in_the_order_of_sending():
    schedule = schedule_of("FE0.1 FE0.0 BE0.0 BE0.1", "FF0.0 FF0.1 BF0.1 BF0.0", placement=(0,), force_placement=(1,))
    assert schedule.messages() == {
        (0, 1): [Message(*actions("FE0.1 FF0.1")), Message(*actions("FE0.0 FF0.0"))],
        (1, 0): [Message(*actions("BF0.1 BE0.1")), Message(*actions("BF0.0 BE0.0"))],
    }
