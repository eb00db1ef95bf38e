"""Emulated steps with sharded state: collectives run beside phases, and take the time that the simulation has."""

from __future__ import annotations

import re

import pytest

from lightning_januspipe.bench.command import main
from lightning_januspipe.bench.emulate import MicrobatchWork, emulate_mesh
from lightning_januspipe.bench.emulate.sharded_steps import emulate_sharded
from lightning_januspipe.engine.timeline import recorded_report
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import PhaseCosts, StateCosts, build_schedule, simulate
from lightning_januspipe.schedule.state_actions import with_state_changes
from lightning_januspipe.testing import RankPool

COSTS = PhaseCosts(1.0, 1.5, 1.4, 0.9, 1.1, 0.6)
UNIT = 4e-3


def test_collectives_run_beside_phases(pool: RankPool) -> None:
    shape, state = MeshShape(2, 2, 1), StateCosts(3.0, 5.0)
    schedule = with_state_changes(build_schedule("1f1b-fold", 2, 3, COSTS), "parameters")
    work = [[MicrobatchWork((1.0,))] * 3] * 2
    mesh = emulate_mesh(shape, schedule, COSTS, [work], seconds_per_unit=UNIT, pool=pool, state=state)
    (step,) = mesh.steps
    assert step.makespan >= step.simulated, "sleeping takes as long as it takes"
    simulated = simulate(schedule, COSTS, state=state)
    for data in range(2):
        report = recorded_report(schedule, {p: step.actions[shape.rank(p, data, 0)] for p in range(2)})
        for order in schedule.actions:
            for action in order:
                lasts = simulated.end[action] - simulated.start[action]
                assert report.end[action] - report.start[action] >= UNIT * lasts, action
            gathered, first = order[:2]
            noted = 0.1 * UNIT  # the end is noted after the wait is over; the gathering itself takes many times that
            assert report.start[first] >= report.end[gathered] - noted, "a phase began without its parameters"
        ends = {str(action): end for action, end in report.end.items()}
        begins = {str(action): start for action, start in report.start.items()}
        assert begins["REDUCE1"] < ends["BE0.2"], "it waited for the other stage"
        assert report.hidden_reduction is not None and report.hidden_reduction > 0.1


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--meshes", "4x4"], r"meshes has '4x4'; expected sizes like 4x4x1"),
        (["--level", "none"], "level='none' shares nothing"),
    ):
        with pytest.raises(SystemExit):
            main(["shard", *words])
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x4x1", "2x4x2"])
def test_steps_take_the_simulated_time(mesh: str) -> None:
    """Within 5 %, on a machine without much else to do."""
    *_, row = emulate_sharded(mesh).splitlines()
    difference = re.search(r"([+-]\d+\.\d)%", row)
    assert difference is not None and abs(float(difference[1])) < 5, row
