"""All schedules for random requests, the aims in simulated time, and golden files.

``PYTHONPATH=tests/support python tests/schedule/test_generators.py`` writes the golden files anew.
"""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import (
    ALL_ONES,
    COSTS,
    MEASURED,
    NAMES,
    memory_costs,
    phase_costs,
    rank_of,
    requests,
    start_times,
    waits_for,
)

from lightning_januspipe.schedule import (
    Action,
    Phase,
    PhaseCosts,
    Schedule,
    build_schedule,
    simulate,
    unfolded,
    validate_schedule,
)
from lightning_januspipe.schedule import wavek as wavek_module
from lightning_januspipe.schedule.actions import COMPUTED_PHASES, CRITICAL_PHASES
from lightning_januspipe.schedule.bounds import lower_bound
from lightning_januspipe.schedule.costs import MemoryCosts, costs_per_stage
from lightning_januspipe.schedule.request import Request
from lightning_januspipe.schedule.wavek import search_wavek

GOLDEN = {
    "gpipe-p1-m2": (("gpipe", 1, 2, COSTS), {}),
    "gpipe-p2-m3": (("gpipe", 2, 3, COSTS), {}),
    "1f1b-fold-p3-m5": (("1f1b-fold", 3, 5, COSTS), {}),
    "1f1b-fold-p4-m2": (("1f1b-fold", 4, 2, COSTS), {}),
    "1f1b-2nd-p3-m4": (("1f1b-2nd", 3, 4, COSTS), {"chunks": 2}),
    "hanayo-2nd-p3-m4": (("hanayo-2nd", 3, 4, COSTS), {"chunks": 2}),
    "wavek-p2-m4": (("wavek", 2, 4, COSTS), {}),
    "wavek-p3-m6-k2": (("wavek", 3, 6, COSTS), {"wave_size": 2}),
    "wavek-p4-m8": (("wavek", 4, 8, COSTS), {}),
    "wavek-zb-p2-m4": (("wavek-zb", 2, 4, MEASURED), {"chunks": 1}),
    "wavek-zb-p3-m4": (("wavek-zb", 3, 4, MEASURED), {"chunks": 2}),
    "wavek-zb-p3-m6-live3": (("wavek-zb", 3, 6, MEASURED), {"max_live": 3}),
}
GOLDEN_FOLDER = Path(__file__).parent / "golden"

sizes = {"num_ranks": st.integers(1, 6), "num_microbatches": st.integers(1, 12)}


def write_golden() -> None:
    """Write the golden files anew, after a change that is meant to give other schedules."""
    for name, (arguments, options) in GOLDEN.items():
        (GOLDEN_FOLDER / f"{name}.csv").write_text(build_schedule(*arguments, **options).to_csv())


def _assert_complete(schedule, deferred):
    phases = COMPUTED_PHASES if deferred else CRITICAL_PHASES
    expected = {
        Action(phase, stage, m)
        for phase in phases
        for stage in range(schedule.num_stages)
        for m in range(schedule.num_microbatches)
    }
    listed = [action for order in schedule.actions for action in order]
    assert len(listed) == len(expected) and set(listed) == expected
    for rank, order in enumerate(schedule.actions):
        assert all(rank_of(schedule, action) == rank for action in order)


def _assert_true_times(schedule, report, latency):
    """Nothing starts before what it depends on is there, and a rank does one thing at a time."""
    slack = 1e-9 * report.makespan
    for order in schedule.actions:
        for before, action in zip((None, *order), order, strict=False):
            assert before is None or report.start[action] >= report.end[before] - slack
            for needed in waits_for(action, schedule.num_stages):
                is_here = rank_of(schedule, needed) == rank_of(schedule, action)
                assert report.start[action] >= report.end[needed] + (0.0 if is_here else latency) - slack
    expected = start_times(schedule, lambda a: report.end[a] - report.start[a], latency)
    assert report.start == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "examples"),
    [("gpipe", 12), ("1f1b-fold", 20), ("1f1b-2nd", 20), ("hanayo-2nd", 15), ("wavek", 12), ("wavek-zb", 12)],
)
def test_every_schedule_is_complete_true_and_within_its_cap(name, examples):
    @settings(max_examples=examples, deadline=None)
    @given(requests(name))
    def check(request):
        (_, num_ranks, num_microbatches, costs), options = arguments, options = request
        schedule = build_schedule(*arguments, **options)
        validate_schedule(schedule)
        deferred = name == "wavek-zb"
        _assert_complete(schedule, deferred)
        report = simulate(schedule, costs, comm=options["latency"])
        _assert_true_times(schedule, report, options["latency"])
        default = {"gpipe": num_microbatches, "1f1b-fold": num_ranks, "1f1b-2nd": num_ranks}.get(name, 2 * num_ranks)
        if name.startswith("wavek") and options["wave_size"] != "auto":
            default = options["wave_size"]
        cap = options["max_live"] or default
        if name.startswith("1f1b"):
            cap = min(cap, num_ranks)
        assert all(live <= cap for live in report.peak_live)
        assert report.makespan >= report.ideal * (1 - 1e-9)
        if schedule.is_folded:
            per_stage = costs_per_stage(costs, num_ranks, schedule.num_stages)
            bound = lower_bound(
                per_stage, schedule.placement, num_microbatches, deferred=deferred, latency=options["latency"]
            )
            assert report.makespan >= bound * (1 - 1e-9)
        assert build_schedule(*arguments, **options) == schedule
        assert Schedule.from_csv(schedule.to_csv()) == schedule
        assert Schedule.parse(str(schedule)) == schedule

    check()


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 6), st.integers(1, 16), phase_costs, st.sampled_from([1, 2]), st.floats(0.0, 1.0))
def test_deferral_keeps_the_cap_of_one_and_two_rounds(num_ranks, num_microbatches, costs, rounds, latency):
    cap = rounds * num_ranks
    schedule = build_schedule("wavek-zb", num_ranks, num_microbatches, costs, max_live=cap, latency=latency)
    live = simulate(schedule, costs).peak_live
    assert len(live) == num_ranks and max(live) <= cap


@given(**sizes, costs=phase_costs)
@settings(max_examples=20, deadline=None)
def test_gpipe_goes_phase_by_phase(num_ranks, num_microbatches, costs):
    schedule = build_schedule("gpipe", num_ranks, num_microbatches, costs)
    for order in schedule.actions:
        assert [action.phase for action in order] == [
            phase for phase in CRITICAL_PHASES for _ in range(num_microbatches)
        ]
    assert simulate(schedule, costs).peak_live == (num_microbatches,) * num_ranks


@given(**sizes, costs=phase_costs)
@settings(max_examples=20, deadline=None)
def test_1f1b_fold_does_not_look_at_the_costs(num_ranks, num_microbatches, costs):
    schedule = build_schedule("1f1b-fold", num_ranks, num_microbatches, costs)
    assert schedule == build_schedule("1f1b-fold", num_ranks, num_microbatches, COSTS)


def test_1f1b_fold_on_one_rank_finishes_a_microbatch_before_the_next():
    (order,) = build_schedule("1f1b-fold", 1, 3, COSTS).actions
    assert [(action.microbatch, action.phase) for action in order] == [
        (m, p) for m in range(3) for p in CRITICAL_PHASES
    ]


def test_unfolded_baselines_are_the_unrolled_chain_cut_evenly():
    # Four stages with FE + BE = 3/2 each, and their forces with FE + FF + BF + BE = 9/2 each: 24 in two parts.
    chain = build_schedule("1f1b-2nd", 2, 4, ALL_ONES, chunks=2)
    assert (chain.placement, chain.force_placement) == ((0, 0, 0, 0), (1, 1, 1, 0))
    assert [chain.is_split(stage) for stage in range(4)] == [True, True, True, False]
    # In four parts, down the ranks and up again.
    wave = build_schedule("hanayo-2nd", 2, 4, ALL_ONES, chunks=2)
    assert (wave.placement, wave.force_placement) == ((0, 0, 0, 0), (0, 1, 1, 1))


@given(**sizes, costs=phase_costs, max_live=st.none() | st.integers(1, 14))
@settings(max_examples=15, deadline=None)
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
    bound = 16 * COSTS.total + (num_ranks - 1) * (COSTS.fe + COSTS.be)
    assert wavek.makespan == pytest.approx(bound)
    assert wavek.makespan < 0.75 * fold.makespan


def test_wave_size_is_a_memory_knob():
    makespans = []
    for wave_size in (1, 2, 4, 8):
        report = simulate(build_schedule("wavek", 4, 16, COSTS, wave_size=wave_size), COSTS)
        assert max(report.peak_live) <= wave_size
        makespans.append(report.makespan)
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > 1.5 * makespans[-1]


def test_wavek_adapts_to_a_slow_rank():
    slow = PhaseCosts(2.0, 2.6, 4.8, 2.5)
    costs = (COSTS, slow, COSTS)
    choice = search_wavek(Request(3, 8, costs))
    report = simulate(choice.schedule, costs)
    assert report.makespan == pytest.approx(choice.makespan)
    assert report.makespan <= simulate(build_schedule("wavek", 3, 8, COSTS), costs).makespan * (1 + 1e-9)
    assert choice.bound * (1 - 1e-9) <= report.makespan < 1.2 * 8 * slow.total


def test_deferrable_parts_are_not_left_out():
    costs = PhaseCosts(1.0, 1.0, 1.0, 1.0, wf=1.0, we=1.0)
    fused = PhaseCosts(1.0, 1.0, 2.0, 2.0)
    assert build_schedule("wavek", 4, 8, costs) == build_schedule("wavek", 4, 8, fused)
    assert simulate(build_schedule("wavek-zb", 2, 4, costs), costs).busy == pytest.approx((24.0, 24.0))


def test_only_wavek_zb_defers():
    for name in NAMES:
        assert (Phase.WF in build_schedule(name, 2, 2, COSTS).phases) == (name == "wavek-zb")


# The aims: exact numbers of simulated time.


@cache
def _report(name, num_ranks, num_microbatches, costs, max_live=None):
    return simulate(build_schedule(name, num_ranks, num_microbatches, costs, max_live=max_live), costs)


def _of_ideal(report):
    return report.makespan / report.ideal


@pytest.mark.parametrize("costs", [ALL_ONES, MEASURED], ids=["equal", "measured"])
@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "aim"), [(4, 8, 1.05), (8, 16, 1.05), (4, 16, 1.03), (8, 32, 1.03)]
)
def test_deferred_waves_are_near_the_ideal(num_ranks, num_microbatches, aim, costs):
    size = num_ranks, num_microbatches, costs
    report = _report("wavek-zb", *size)
    assert _of_ideal(report) <= aim
    assert max(report.peak_live) <= 2 * num_ranks
    assert report.bubble_fraction == pytest.approx(1 - report.ideal / report.makespan)
    tight = _report("wavek-zb", *size, max_live=num_ranks)
    assert _of_ideal(tight) <= 1.12
    assert max(tight.peak_live) <= num_ranks
    fold, wavek = _report("1f1b-fold", *size), _report("wavek", *size)
    assert fold.makespan >= 1.2 * report.makespan
    assert report.makespan <= wavek.makespan <= fold.makespan


@pytest.mark.parametrize("costs", [ALL_ONES, MEASURED], ids=["equal", "measured"])
@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "chain_aim", "wave_aim"),
    [(4, 8, 1.9, 1.7), (8, 16, 1.9, 1.7), (4, 16, 1.7, 1.55), (8, 32, 1.75, 1.6)],
)
def test_deferred_waves_beat_the_unfolded_baselines(num_ranks, num_microbatches, chain_aim, wave_aim, costs):
    size = num_ranks, num_microbatches, costs
    makespan = _report("wavek-zb", *size).makespan
    chain, wave = _report("1f1b-2nd", *size), _report("hanayo-2nd", *size)
    assert chain.makespan >= chain_aim * makespan
    assert wave.makespan >= wave_aim * makespan
    assert max(chain.peak_live) <= num_ranks and max(wave.peak_live) <= 2 * num_ranks


# Memory.


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["wavek", "wavek-zb"]), st.integers(1, 4), st.integers(1, 8), phase_costs, memory_costs, st.data()
)
def test_a_memory_limit_is_kept_or_refused_with_its_bytes(name, num_ranks, num_microbatches, costs, memory, data):
    free = build_schedule(name, num_ranks, num_microbatches, costs)
    peak = max(simulate(free, costs, memory=memory).peak_memory)
    limit = 100 * peak + 1  # more than any order takes
    generous = build_schedule(name, num_ranks, num_microbatches, costs, memory=memory, memory_limit=limit)
    assert generous == free
    limit = data.draw(st.floats(0.0, 1.0)) * peak
    try:
        limited = build_schedule(name, num_ranks, num_microbatches, costs, memory=memory, memory_limit=limit)
    except ValueError as error:
        assert f"memory_limit={limit:.4g} bytes" in str(error)
        alone = build_schedule(name, num_ranks, num_microbatches, costs, max_live=1)
        assert max(simulate(alone, costs, memory=memory).peak_memory) > limit
    else:
        assert max(simulate(limited, costs, memory=memory).peak_memory) <= limit


@pytest.mark.parametrize("name", ["wavek", "wavek-zb"])
def test_a_tight_memory_limit_lowers_the_live_microbatches(name):
    memory = MemoryCosts(energy=2.0, force=1.0, kept=0.5)
    free = simulate(build_schedule(name, 4, 12, MEASURED), MEASURED, memory=memory)
    limit = max(free.peak_memory) / 2
    schedule = build_schedule(name, 4, 12, MEASURED, memory=memory, memory_limit=limit)
    limited = simulate(schedule, MEASURED, memory=memory)
    assert max(limited.peak_memory) <= limit
    assert max(limited.peak_live) < max(free.peak_live)
    assert limited.makespan > free.makespan
    with pytest.raises(ValueError, match=r"memory_limit=0\.5 bytes per rank, but .* already holds [\d.]+ bytes"):
        build_schedule(name, 4, 12, MEASURED, memory=memory, memory_limit=0.5)


@pytest.mark.parametrize("name", ["gpipe", "1f1b-fold", "1f1b-2nd", "hanayo-2nd"])
def test_schedules_without_a_choice_refuse_a_limit_that_they_exceed(name):
    memory = MemoryCosts(energy=1000.0, force=500.0)
    peak = max(simulate(build_schedule(name, 2, 4, COSTS), COSTS, memory=memory).peak_memory)
    build_schedule(name, 2, 4, COSTS, memory=memory, memory_limit=peak)
    with pytest.raises(ValueError, match=rf"holds up to {peak:.4g} bytes on a rank, more than memory_limit=10"):
        build_schedule(name, 2, 4, COSTS, memory=memory, memory_limit=10.0)


# The work of the search.


@pytest.mark.parametrize("name", ["1f1b-2nd", "hanayo-2nd", "wavek", "wavek-zb"])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(4, 8), (16, 64)])
def test_the_search_is_bounded(name, num_ranks, num_microbatches, monkeypatch):
    tried = []

    def count(chain, num_microbatches, priority, max_live, *, deferred=False, deadline=0.0):
        tried.append((6 if deferred else 4) * len(chain.placement) * num_microbatches)
        return real(chain, num_microbatches, cheap, max_live, deferred=deferred, deadline=deadline)

    module = wavek_module if name.startswith("wavek") else unfolded
    real = module.list_schedule
    # The search cannot be cut short by a lucky order: all are this one.
    cheap = wavek_module.Priority(CRITICAL_PHASES, num_microbatches)
    monkeypatch.setattr(module, "list_schedule", count)
    build_schedule(name, num_ranks, num_microbatches, MEASURED)
    # Three caps, and two numbers of stages.
    assert 0 < sum(tried) <= 2 * 3 * max(wavek_module._SEARCHED_ACTIONS, 4 * max(tried))
    assert len(tried) * min(tried) <= 6e5 or len(tried) <= 12


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    arguments, options = GOLDEN[name]
    schedule = build_schedule(*arguments, **options)
    expected = (GOLDEN_FOLDER / f"{name}.csv").read_text()
    assert schedule.to_csv() == expected
    assert Schedule.from_csv(expected) == schedule
    assert {path.stem for path in GOLDEN_FOLDER.glob("*.csv")} == set(GOLDEN)


if __name__ == "__main__":
    write_golden()
