"""Emulated devices: the real executor runs every schedule, and what goes to the wrong place is noticed."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from emulate_workers import with_a_repeated_message, with_a_silent_stage, with_two_actions_swapped
from pools import slow

from lightning_januspipe.bench.command import main
from lightning_januspipe.bench.emulate import EmulationError, emulate
from lightning_januspipe.bench.emulate.emulated_stage import EmulatedStage, emulated_stages, observable, sleep_until
from lightning_januspipe.bench.emulate.rank import check_order
from lightning_januspipe.bench.emulate.schedules import compare_emulated, emulation_table, parse_costs, suitable_unit
from lightning_januspipe.schedule import Action, Phase, PhaseCosts, build_schedule
from lightning_januspipe.schedule.costs import action_times
from lightning_januspipe.testing import RankPool

COSTS = PhaseCosts(1.0, 1.5, 1.4, 0.9, 1.1, 0.6)
UNIT = 2e-3
CASES: list[Any] = [(name, 4, "auto") for name in ("1f1b-2nd", "wavek-zb")] + [
    slow("gpipe", 4, "auto"),
    slow("hanayo-2nd", 4, "auto"),
    slow("1f1b-fold", 4, "auto"),
    slow("wavek", 4, "auto"),
    slow("gpipe", 2, "auto"),
    ("wavek-zb", 2, 1),
    ("wavek-zb", 4, 3),
    ("1f1b-2nd", 2, 4),
    ("hanayo-2nd", 2, 2),
    ("wavek-zb", 1, "auto"),
]


@pytest.mark.parametrize(("name", "num_ranks", "chunks"), CASES)
def test_every_schedule_runs(pool: RankPool, name: str, num_ranks: int, chunks: int | str) -> None:
    schedule = build_schedule(name, num_ranks, 5, COSTS, chunks=chunks)
    run = emulate(schedule, COSTS, seconds_per_unit=UNIT, repeats=2, pool=pool)
    asked = action_times(schedule, COSTS)
    assert set(run.report.start) == {a for order in schedule.actions for a in order}
    for order in schedule.actions:
        for action in order:
            start, end = run.report.start[action], run.report.end[action]
            assert end - start >= UNIT * asked(action.phase, action.stage), action
            assert all(run.report.end[d] < start for d in schedule.dependencies(action)), action
        assert all(run.report.end[a] <= run.report.start[b] for a, b in pairwise(order))
    assert len(run.makespans) == 2 and run.makespan == min(run.makespans)
    assert run.makespan >= run.simulated.makespan, "sleeping takes as long as it takes"
    assert run.with_messages.makespan >= run.simulated.makespan
    assert run.error == pytest.approx(run.makespan / run.with_messages.makespan - 1)
    assert run.report.peak_live == run.simulated.peak_live
    assert (run.latency > 0) == (run.handover > 0) == (num_ranks > 1)
    assert run.oversleep >= 0 and run.turnaround > 0 and run.cpu > 0


def test_costs_of_every_stage(pool: RankPool) -> None:
    costs = [PhaseCosts(1, 1, 1, 1), PhaseCosts(4, 3, 2, 5)]
    run = emulate(build_schedule("1f1b-fold", 2, 2, costs), costs, seconds_per_unit=UNIT, repeats=1, pool=pool)
    for action, start in run.report.start.items():
        took = run.report.end[action] - start
        assert took >= UNIT * costs[action.stage].of(action.phase), action


def test_large_messages_arrive_whole(pool: RankPool) -> None:
    schedule = build_schedule("wavek", 2, 3, COSTS)
    run = emulate(schedule, COSTS, seconds_per_unit=UNIT, repeats=1, message_bytes=4_000_000, pool=pool)
    assert run.latency > 1e-4


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("gpipe", "FE", "FE"),
        ("gpipe", "FF", "FF"),
        ("wavek-zb", "BF", "BF"),
        ("wavek-zb", "BE", "BE"),
        ("1f1b-2nd", "FE", "FF"),
        ("1f1b-2nd", "BF", "BE"),
    ],
)
def test_a_message_to_the_wrong_action_is_noticed(pool: RankPool, name: str, source: str, target: str) -> None:
    schedule = build_schedule(name, 2, 3, COSTS, chunks=3 if name == "1f1b-2nd" else "auto")
    errors = pool.run(with_a_repeated_message, schedule, source, target, world_size=2)
    noticed = [e for e in errors if e.startswith("EmulationError")]
    assert noticed, errors
    # What comes first: the loss of the step, which reads forces and energies, or the phase.
    by_phase = f"EmulationError: {target}" in noticed[0] and "it was made by another action" in noticed[0]
    by_loss = source == "BF" and "expected 2 from every stage" in noticed[0]
    assert by_phase or by_loss, errors


def test_a_part_that_is_missing_is_noticed(pool: RankPool) -> None:
    errors = pool.run(with_a_silent_stage, build_schedule("wavek", 2, 2, COSTS), 1, world_size=2)
    assert any("expected 1 from every stage" in e for e in errors), errors


def test_another_order_is_noticed(pool: RankPool) -> None:
    """FE of two micro-batches swapped on the last rank: the messages are right, but the order is not the schedule's."""
    schedule = build_schedule("gpipe", 2, 3, COSTS)
    errors = pool.run(with_two_actions_swapped, schedule, 1, 2, world_size=2)
    assert "rank 1 ran FE1.2 as its action 1, its schedule has FE1.1 there" in errors[1], errors


def test_check_order() -> None:
    order = (Action(Phase.FE, 0, 0), Action(Phase.FF, 0, 0))
    check_order(0, list(order), order)
    with pytest.raises(EmulationError, match="rank 3 ran 1 actions, its schedule has 2"):
        check_order(3, order[:1], order)
    with pytest.raises(EmulationError, match=r"ran FF0\.0 as its action 0, its schedule has FE0\.0"):
        check_order(0, order[::-1], order)


def test_a_stage_checks_the_loss_and_forgets_micro_batches() -> None:
    _, functions = emulated_stages(1, 8)
    stage = EmulatedStage(functions[0], 1, dict.fromkeys(Phase, 0.0), ran := [])
    for microbatch, serial in ((0, 7), (1, 8)):
        boundary, observables = stage.forward_energy(microbatch, [observable(serial, 0)[0]], [])
        assert not boundary and [y.tolist() for y in observables] == [[serial, 0], [serial, 1]]
        stage.forward_force(microbatch, [])
    with pytest.raises(EmulationError, match=r"BF0\.1 got the loss of micro-batch 7, expected 8"):
        stage.backward_force(1, [], [observable(7, 0)])
    stage.backward_force(0, [], [observable(7, 0)])
    with pytest.raises(EmulationError, match=r"BE0\.0 got 1 tensors, expected 0"):
        stage.backward_energy(0, [observable(7, 0)], [])
    stage.backward_energy(0, [], [observable(7, 0)])
    assert stage.num_inflight == 1
    stage.clear()
    assert stage.num_inflight == 0
    assert [str(a) for a in ran] == ["FE0.0", "FF0.0", "FE0.1", "FF0.1", "BF0.1", "BF0.0", "BE0.0", "BE0.0"]


def test_sleeping_is_long_enough_and_idle() -> None:
    began, before = time.perf_counter(), time.process_time()
    for i in range(1, 21):
        sleep_until(began + 5e-3 * i)
        assert time.perf_counter() >= began + 5e-3 * i
    assert time.process_time() - before < 0.05
    sleep_until(began)


@pytest.mark.parametrize("argument", ["seconds_per_unit", "repeats", "message_bytes"])
def test_refuses_what_is_not_positive(argument: str) -> None:
    given = {"seconds_per_unit": 1.0, argument: 0}
    with pytest.raises(ValueError, match=f"{argument}=0; expected a positive number"):
        emulate(build_schedule("gpipe", 1, 1, COSTS), COSTS, **given)  # type: ignore[arg-type]


def test_refuses_a_pool_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="the mesh has 3 ranks, but the pool has 2 processes"):
        emulate(build_schedule("gpipe", 3, 1, COSTS), COSTS, seconds_per_unit=1.0, pool=RankPool(2))


class TestCommand:
    def test_unit_from_the_shortest_action(self) -> None:
        schedules = [build_schedule("gpipe", 2, 2, COSTS), build_schedule("wavek-zb", 2, 2, COSTS, chunks=2)]
        assert suitable_unit(schedules[:1], COSTS) == pytest.approx(8e-3 / 1.0)
        assert suitable_unit(schedules, COSTS) == pytest.approx(8e-3 / 0.3)
        assert suitable_unit([build_schedule("gpipe", 32, 2, COSTS)], COSTS) == pytest.approx(12e-3)

    def test_costs(self) -> None:
        assert parse_costs("1,1.5,1.4,0.9,1.1,0.6") == COSTS
        with pytest.raises(ValueError, match="expected 6 numbers with commas between them: fe,ff,bf,be,wf,we"):
            parse_costs("1,2,3")

    def test_table(self, pool: RankPool) -> None:
        lines: list[str] = []
        names = ["1f1b-2nd", "wavek-zb"]
        runs = compare_emulated(names, 2, 4, COSTS, seconds_per_unit=UNIT, repeats=1, pool=pool, report=lines.append)
        assert [run.schedule.name for run in runs] == names and len(lines) == 2
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in emulation_table(runs).splitlines()[:4]]
        assert all(len(row) == len(rows[0]) == 10 for row in rows)
        for row, run in zip(rows[2:], runs, strict=True):
            assert row[0] == run.schedule.name
            assert row[1] == f"{run.simulated.makespan:.3f}" and row[3] == f"{run.makespan:.3f}"
            assert row[5].endswith("%") and float(row[6][:-1]) == pytest.approx(100 * run.error, abs=0.06)
            assert float(row[7]) == pytest.approx(run.makespan / (4 * COSTS.total * UNIT), abs=1e-3)
            assert float(row[8]) == pytest.approx(runs[0].makespan / run.makespan, abs=1e-2)
            assert int(row[9]) == max(run.simulated.peak_live)
        assert emulation_table(runs[1:]).splitlines()[2].split("|")[-3].strip() == "", "no baseline to compare with"

    @pytest.mark.parametrize("words", [["emulate"], ["--emulate"]])
    def test_bench_emulate(
        self, words: list[str], pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        monkeypatch.setattr("lightning_januspipe.bench.emulate.schedules.device_pool", lambda size: nullcontext(pool))
        options = ["--ranks=2", "--microbatches=3", "--schedules=gpipe", "--repeats=1", "--seconds_per_unit=0.002"]
        main([*words, *options, "--costs=1,1,1,1,1,1", f"--output={tmp_path}"])
        assert "| gpipe | 0.0" in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"gpipe.png", "gpipe.json"}
        events = json.loads((tmp_path / "gpipe.json").read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 2 * 2 * 4 * 3

    @pytest.mark.parametrize("words", [["--schedules=none"], ["--costs=1,2"], ["--ranks=0"]])
    def test_a_wrong_argument_is_an_error(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["emulate", *words])
        assert exit_info.value.code == 2
        assert "expected" in capsys.readouterr().err
