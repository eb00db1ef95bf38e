"""Numbers of recorded steps: cases to be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_januspipe.callbacks.rank_metrics import RankNumbers, metrics
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.timeline import Span
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.runtime.step_recorder import RankStep, StepRecorder
from lightning_januspipe.schedule import Action, Phase, PhaseCosts, build_schedule

SCHEDULE = build_schedule("gpipe", 2, 2, PhaseCosts(1, 1, 1, 1))


def rank_step(stage: int, times: dict[tuple[Phase, int], tuple[float, float]], sent: int) -> RankStep:
    spans = tuple(Span(Action(phase, stage, m), start, end) for (phase, m), (start, end) in times.items())
    return RankStep(SCHEDULE, spans, sent)


def numbers(slower: float = 1.0) -> list[RankNumbers]:
    """Two ranks of a pipeline and two micro-batches, of which the second takes longer."""
    first = {(Phase.FE, 0): (0.0, 1.0), (Phase.FE, 1): (1.0, 4.0), (Phase.FF, 1): (7.0, 8.0)}
    second = {(Phase.FE, 0): (2.0, 3.0), (Phase.FE, 1): (4.0, 5.0)}
    scaled = [{k: (a * slower, b * slower) for k, (a, b) in times.items()} for times in (first, second)]
    return [
        RankNumbers.of_step(rank_step(0, scaled[0], 100), (4.0, 80, 8), 1000.0),
        RankNumbers.of_step(rank_step(1, scaled[1], 50), (5.0, 80, 8), 2000.0),
    ]


def test_one_pipeline() -> None:
    found = metrics(numbers(), MeshShape(2, 1))
    assert found == {
        "januspipe/atoms_per_s": 80 / 5,
        "januspipe/structures_per_s": 8 / 5,
        "januspipe/step_ms": 8000.0,
        "januspipe/bubble_fraction": pytest.approx(3 / 8),
        "januspipe/bubble_fraction/rank0": pytest.approx(3 / 8),
        "januspipe/bubble_fraction/rank1": pytest.approx(6 / 8),
        "januspipe/microbatch_imbalance": pytest.approx(5 / 3.5),
        "januspipe/FE_ms/stage0": 2000.0,
        "januspipe/FF_ms/stage0": 1000.0,
        "januspipe/FE_ms/stage1": 1000.0,
        "januspipe/message_bytes": 150.0,
        "januspipe/peak_memory_bytes/rank0": 1000.0,
        "januspipe/peak_memory_bytes/rank1": 2000.0,
    }


def test_replicas() -> None:
    """The mesh's ranks are (pipeline, replica); the second replica takes three times as long."""
    (a, b), (c, d) = numbers(), numbers(slower=3.0)
    found = metrics([a, c, b, d], MeshShape(2, 2))
    assert found["januspipe/atoms_per_s"] == 160 / 5
    assert found["januspipe/step_ms"] == 24000.0
    assert found["januspipe/replica_imbalance"] == pytest.approx(24 / 16)
    assert found["januspipe/microbatch_imbalance"] == pytest.approx(5 / 3.5)
    assert found["januspipe/FE_ms/stage0"] == pytest.approx(4000.0)
    assert found["januspipe/bubble_fraction"] == pytest.approx(3 / 8)
    assert found["januspipe/message_bytes"] == 300.0


def test_single_process() -> None:
    spans = (Span(Action(Phase.FE, 0, 0), 0.0, 1.0), Span(Action(Phase.FE, 0, 1), 1.0, 4.0))
    mine = RankNumbers.of_step(RankStep(None, spans, 0), (2.0, 10, 2), None)
    assert metrics([mine], MeshShape(1, 1)) == {
        "januspipe/atoms_per_s": 5.0,
        "januspipe/structures_per_s": 1.0,
        "januspipe/step_ms": 4000.0,
        "januspipe/microbatch_imbalance": 1.5,
    }


def test_what_is_not_known_is_left_out() -> None:
    assert metrics([RankNumbers.of_step(None, (0.0, 0, 0), None)], MeshShape(1, 1)) == {}


def test_vectors_are_of_one_length_and_keep_everything() -> None:
    first, second = numbers()
    empty = RankNumbers.of_step(None, (0.0, 0, 0), None)
    assert len({len(n.vector(2, 5)) for n in (first, second, empty)}) == 1
    for given in (first, second):
        back = RankNumbers.from_vector(given.vector(2, 5), 2)
        assert back == RankNumbers(**{**vars(given), "microbatches": list(given.microbatches)})
    assert math.isnan(RankNumbers.from_vector(empty.vector(0, 1), 0).busy)


def test_a_watch_records_what_it_was_asked_for() -> None:
    buffers, action = GradientBuffers(), Action(Phase.FE, 0, 0)
    watch, sent = StepRecorder(torch.device("cpu"), buffers.sums), [10]
    parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))

    def step(always: bool = False) -> bool:
        with watch.step(SCHEDULE, lambda: sent[0], always) as recorder:
            if recorder is not None:
                recorder.start(action)
            kept = [parameter * 2, parameter + 1]
            buffers.add([parameter], [torch.ones_like(parameter)])
            if recorder is not None:
                recorder.end(action)
            sent[0] += 7
            del kept
        return recorder is not None

    assert not step()
    assert step(always=True) and watch.rank_step is None
    watch.ask(memory=True)
    assert step() and watch.held == 80 and watch.rank_step is None, "two products, but no gradient"
    watch.ask()
    assert step() and watch.rank_step is not None and not step()
    assert watch.rank_step.bytes_sent == 7 and [s.action for s in watch.rank_step.spans] == [action]
    watch.held = None
    watch.ask(memory=True)
    assert step(always=True) and watch.held is None, "times are needed more"
