"""Measured times of actions, and their means."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_januspipe.engine.timeline import ActionRecorder, MeanPhaseTimes, Span, recorded_report
from lightning_januspipe.schedule import Action, Phase, PhaseCosts, build_schedule, simulate

COSTS = PhaseCosts(1.0, 1.2, 1.1, 0.9)
FE, FF = Action(Phase.FE, 0, 0), Action(Phase.FF, 0, 0)


def test_only_what_is_between_start_and_end_counts() -> None:
    recorder = ActionRecorder(torch.device("cpu"))
    before = time.perf_counter()
    recorder.reset()
    for action in (FE, FF):
        recorder.start(action)
        time.sleep(0.02)
        recorder.end(action)
        time.sleep(0.05)
    first, second = recorder.spans()
    assert (first.action, second.action) == (FE, FF) and recorder.began >= before
    assert 0 <= first.start < 0.05 and first.end - first.start >= 0.02
    assert second.start - first.end >= 0.05
    recorder.reset()
    assert recorder.spans() == []


def test_a_recorded_step_is_reported_as_a_simulated_one() -> None:
    """On a clock that does not start at zero."""
    schedule = build_schedule("1f1b-fold", 2, 3, COSTS)
    simulated = simulate(schedule, COSTS)
    spans = {
        rank: [Span(a, simulated.start[a] + 7.0, simulated.end[a] + 7.0) for a in order]
        for rank, order in enumerate(schedule.actions)
    }
    report = recorded_report(schedule, spans)
    assert report.makespan == pytest.approx(simulated.makespan)
    assert report.start == pytest.approx(simulated.start) and report.end == pytest.approx(simulated.end)
    assert report.busy == pytest.approx(simulated.busy) and report.ideal == pytest.approx(max(simulated.busy))


def test_means_are_over_micro_batches_and_steps() -> None:
    means = MeanPhaseTimes()
    assert means.means() == {}
    means.add([Span(FE, 0.0, 1.0), Span(Action(Phase.FE, 0, 1), 5.0, 8.0), Span(FF, 1.0, 1.5)])
    means.add([Span(FE, 2.0, 4.0), Span(Action(Phase.FE, 1, 0), 4.0, 4.25)])
    assert means.means() == pytest.approx({(0, Phase.FE): 2.0, (0, Phase.FF): 0.5, (1, Phase.FE): 0.25})
