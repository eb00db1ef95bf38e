import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_models import phase_costs, schedule_of

from lightning_januspipe.schedule import Link, MemoryCosts, Phase, PhaseCosts
from lightning_januspipe.schedule.actions import COMPUTED_PHASES
from lightning_januspipe.schedule.costs import action_times, costs_per_stage, durations, memory_per_stage

BINARY = PhaseCosts(1.0, 2.0, 4.0, 8.0, wf=16.0, we=32.0)


def test_phase_costs():
    assert BINARY.total == 63.0
    assert [BINARY.of(phase) for phase in COMPUTED_PHASES] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert BINARY.fused() == PhaseCosts(1.0, 2.0, 20.0, 40.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("fe", 0.0), ("ff", -1.0), ("bf", float("nan")), ("be", float("inf")), ("wf", -0.1), ("fe", "1"), ("ff", True)],
)
def test_phase_costs_refuse_what_is_no_time(field, value):
    with pytest.raises(ValueError, match=rf"PhaseCosts\.{field} is"):
        PhaseCosts(**{"fe": 1.0, "ff": 1.0, "bf": 1.0, "be": 1.0, field: value})


@pytest.mark.parametrize(("field", "value"), [("energy", -1.0), ("force", math.nan), ("kept", math.inf)])
def test_memory_costs_refuse_what_is_no_size(field, value):
    with pytest.raises(ValueError, match=rf"MemoryCosts\.{field} is"):
        MemoryCosts(**{"energy": 1.0, "force": 1.0, field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("latency", -1.0), ("latency", math.inf), ("message_bytes", math.nan), ("bandwidth", 0.0)]
)
def test_link_refuses_what_is_no_number(field, value):
    with pytest.raises(ValueError, match=rf"Link\.{field} is"):
        Link(**{field: value})


def test_link_occupies_its_channel():
    assert Link(1.0, bandwidth=4.0, message_bytes=10.0).occupied == 2.5
    assert Link(1.0, message_bytes=10.0).occupied == 0.0


def test_one_entry_is_shared_by_the_stages_of_a_rank():
    assert costs_per_stage(BINARY, 3, 3) == (BINARY,) * 3
    assert costs_per_stage(BINARY, 2, 4) == (PhaseCosts(0.5, 1.0, 2.0, 4.0, 8.0, 16.0),) * 4
    assert memory_per_stage(MemoryCosts(4.0, 2.0, 1.0), 1, 2) == (MemoryCosts(2.0, 1.0, 0.5),) * 2


def test_entries_per_rank_are_pieces_of_the_chain():
    slow = PhaseCosts(*(3 * BINARY.of(phase) for phase in COMPUTED_PHASES))
    half, slow_half = costs_per_stage(BINARY, 1, 2)[0], costs_per_stage(slow, 1, 2)[0]
    assert costs_per_stage([BINARY, slow], 2, 4) == (half, half, slow_half, slow_half)
    # Three stages of two pieces: the middle one has a third of each.
    middle = costs_per_stage([BINARY, slow], 2, 3)[1]
    assert middle.fe == pytest.approx(1 / 3 * 1.0 + 1 / 3 * 3.0)


@given(st.lists(phase_costs, min_size=1, max_size=5), st.integers(1, 12))
def test_stages_keep_the_whole_work(costs, num_stages):
    stages = costs_per_stage(costs, len(costs), num_stages)
    assert len(stages) == num_stages
    for phase in COMPUTED_PHASES:
        assert sum(entry.of(phase) for entry in stages) == pytest.approx(sum(entry.of(phase) for entry in costs))


@pytest.mark.parametrize("wrong", [[BINARY], (1.0, 1.0), None, [BINARY] * 3])
def test_other_numbers_of_entries_are_refused(wrong):
    with pytest.raises(ValueError, match="expected one PhaseCosts, or a sequence of 2, one per rank, or 4, one per"):
        costs_per_stage(wrong, 2, 4)


def test_durations():
    assert list(durations(BINARY, deferred=True, split=False).values()) == [1, 2, 4, 8, 16, 32]
    fused = durations(BINARY, deferred=False, split=False)
    assert [fused[phase] for phase in COMPUTED_PHASES[:4]] == [1, 2, 20, 40]
    # The other rank computes FE again, and BF goes back through it: FF = fe + ff, BF = bf + be with all weights.
    split = durations(BINARY, deferred=False, split=True)
    assert [split[phase] for phase in COMPUTED_PHASES[:4]] == [1, 3, 60, 40]


def test_only_split_stages_compute_twice():
    schedule = schedule_of("FE0.0 FE1.0", "FF0.0", placement=(0, 0), force_placement=(1, 0))
    times = action_times(schedule, [BINARY, BINARY])
    assert [times(Phase.FF, stage) for stage in (0, 1)] == [3.0, 2.0]
    assert [times(Phase.BF, stage) for stage in (0, 1)] == [60.0, 20.0]
