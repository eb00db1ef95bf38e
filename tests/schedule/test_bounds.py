import pytest
from schedule_models import COSTS

from lightning_januspipe.schedule import PhaseCosts, build_schedule, simulate
from lightning_januspipe.schedule.bounds import lower_bound
from lightning_januspipe.schedule.costs import costs_per_stage

BINARY = PhaseCosts(1.0, 2.0, 4.0, 8.0, wf=16.0, we=32.0)


@pytest.mark.parametrize("deferred", [False, True])
def test_one_rank_works_all_the_time(deferred):
    assert lower_bound([BINARY], [0], 5, deferred=deferred, latency=9.0) == 5 * 63.0
    assert lower_bound([BINARY, BINARY], [0, 0], 5, deferred=deferred, latency=9.0) == 5 * 126.0


def test_equal_stages():
    """M·T + (P-1)(t_FE + t_BE), and with deferral M·T + (P-1) t_FE."""
    assert lower_bound([BINARY] * 4, range(4), 8) == 8 * 63 + 3 * (1 + 40)
    assert lower_bound([BINARY] * 4, range(4), 8, deferred=True) == 8 * 63 + 3 * 1
    assert lower_bound([BINARY] * 4, range(4), 8, latency=0.5) == 8 * 63 + 3 * (1 + 40 + 2 * 0.5)
    assert lower_bound([BINARY] * 4, range(4), 8, deferred=True, latency=0.5) == 8 * 63 + 3 * 1.5


def test_one_microbatch_takes_its_chain():
    assert lower_bound([BINARY] * 4, range(4), 1) == 4 * 63
    assert lower_bound([BINARY] * 4, range(4), 1, latency=1.0) == 4 * 63 + 4 * 3
    # The last BE is followed by its WE.
    assert lower_bound([BINARY] * 40, range(40), 1, deferred=True) == 40 * 15 + 32


def test_chunks_start_the_last_rank_sooner():
    halves = costs_per_stage(BINARY, 4, 8)
    assert lower_bound(halves, (0, 1, 2, 3, 3, 2, 1, 0), 8, deferred=True) == 8 * 63 + 3 * 0.5


def test_unequal_stages_are_bound_by_the_busiest_rank():
    slow = PhaseCosts(3.0, 6.0, 12.0, 24.0)
    fast = PhaseCosts(1.0, 2.0, 4.0, 8.0)
    assert lower_bound([fast, slow, fast], range(3), 4) == 4 * 45 + 1 + 8
    assert lower_bound([slow, fast], range(2), 4) == 4 * 45


def test_the_bound_can_be_reached():
    schedule = build_schedule("wavek", 4, 16, COSTS)
    assert simulate(schedule, COSTS).makespan == pytest.approx(lower_bound([COSTS] * 4, range(4), 16))
