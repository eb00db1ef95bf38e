import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_januspipe.schedule import Action, Phase, PhaseCosts, Schedule
from lightning_januspipe.schedule.actions import CHAIN_PHASES, costs_per_rank, dependencies, predecessor, successor

ACTIONS = st.builds(Action, st.sampled_from(Phase), st.integers(0, 40), st.integers(0, 200))


def _actions(text):
    return tuple(map(Action.parse, text.split()))


@st.composite
def _schedules(draw):
    num_ranks = draw(st.integers(1, 4))
    orders = draw(st.lists(st.lists(ACTIONS, max_size=6), min_size=num_ranks, max_size=num_ranks))
    placement = draw(st.lists(st.integers(0, num_ranks - 1), max_size=6))
    return Schedule("some-name, 2", num_ranks, draw(st.integers(1, 9)), tuple(map(tuple, orders)), tuple(placement))


@given(ACTIONS)
def test_action_text_round_trips(action):
    assert Action.parse(str(action)) == action


def test_action_text_is_compact():
    assert str(Action(Phase.FE, 0, 3)) == "FE0.3"
    assert Action.parse(" WE12.30 ") == Action(Phase.WE, 12, 30)


@pytest.mark.parametrize("text", ["", "FE", "FE0", "FE0.", "XX0.1", "FE-1.0", "fe0.1", "FE0.1.2", "FE 0.1"])
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
    action = Action(data.draw(st.sampled_from(CHAIN_PHASES)), data.draw(st.integers(0, num_stages - 1)), 0)
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
        ("WE1.1", "BE1.1"),
    ],
)
def test_dependencies(action, expected):
    assert dependencies(Action.parse(action), num_stages=3) == _actions(expected)


def test_deferred_phases_are_off_the_chain():
    for phase in (Phase.WF, Phase.WE):
        assert predecessor(Action(phase, 1, 0), 3) is None
        assert successor(Action(phase, 1, 0), 3) is None


def test_costs():
    costs = PhaseCosts(1.0, 2.0, 3.0, 4.0, wf=0.5, we=0.25)
    assert costs.total == 10.75
    assert [costs.of(phase) for phase in Phase] == [1.0, 2.0, 3.0, 4.0, 0.5, 0.25]
    assert costs.fused() == PhaseCosts(1.0, 2.0, 3.5, 4.25)


@pytest.mark.parametrize(
    ("field", "value"),
    [("fe", 0.0), ("ff", -1.0), ("bf", float("nan")), ("be", float("inf")), ("wf", -0.1), ("fe", "1"), ("ff", True)],
)
def test_costs_refuse_what_is_no_time(field, value):
    with pytest.raises(ValueError, match=rf"PhaseCosts\.{field} is"):
        PhaseCosts(**{"fe": 1.0, "ff": 1.0, "bf": 1.0, "be": 1.0, field: value})


def test_costs_per_rank():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0)
    assert costs_per_rank(costs, 3) == (costs,) * 3
    assert costs_per_rank([costs, costs], 2) == (costs, costs)
    for wrong in ([costs], (1.0, 1.0), None):
        with pytest.raises(ValueError, match="expected one PhaseCosts, or a sequence of 2"):
            costs_per_rank(wrong, 2)


@given(_schedules())
def test_schedule_round_trips(schedule):
    assert Schedule.from_csv(schedule.to_csv()) == schedule
    assert Schedule.parse(str(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_schedule_text_and_csv():
    schedule = Schedule("tiny", 1, 1, (_actions("FE0.0 FF0.0 BF0.0 BE0.0"),))
    assert str(schedule) == "tiny: 1 micro-batches, stages on ranks 0\nrank 0: FE0.0 FF0.0 BF0.0 BE0.0"
    assert schedule.to_csv() == "name,tiny\nnum_microbatches,1\nplacement,0\n0,FE0.0,FF0.0,BF0.0,BE0.0\n"


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
        (("a: b", 1, 1, ((),)), "without a colon"),
    ],
)
def test_schedule_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_messages_of_two_stages_per_rank():
    schedule = Schedule("snake", 2, 1, ((), ()), (0, 1, 1, 0))
    assert (schedule.sender(Action(Phase.FE, 1, 0)), schedule.receiver(Action(Phase.FE, 0, 0))) == (0, 1)
    assert schedule.sender(Action(Phase.FE, 2, 0)) is None
    assert schedule.receiver(Action(Phase.FE, 3, 0)) is None
    assert schedule.receiver(Action(Phase.FF, 3, 0)) == 1
    assert schedule.receiver(Action(Phase.WF, 1, 0)) is None
