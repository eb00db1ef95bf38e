"""The executor on real ranks: every schedule gives the double backward's gradients, and failures name their cause."""

from __future__ import annotations

import re
import time

import pytest
from engine_workers import (
    evaluate_like_reference,
    make_executor_alone,
    num_inflight,
    step_with_a_dead_rank,
    step_with_a_hanging_rank,
    train_like_reference,
    unequal_inputs,
)
from pools import pool_of, slow
from toy import assert_close, double_backward, loss_gradients

from lightning_januspipe.schedule import PhaseCosts, build_schedule
from lightning_januspipe.testing import RankError, RankPool

FOLDED = ("gpipe", "1f1b-fold", "wavek", "wavek-zb")
UNFOLDED = ("1f1b-2nd", "hanayo-2nd")


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        *(("everything", schedule) for schedule in (*FOLDED, *UNFOLDED)),
        *(("two stages", schedule) for schedule in ("gpipe", "1f1b-2nd")),
        *(("three stages", schedule) for schedule in ("wavek-zb", "hanayo-2nd")),
        *(
            slow(layout, schedule)
            for layout, schedules in (
                ("two stages", ("1f1b-fold", "wavek", "wavek-zb", "hanayo-2nd")),
                ("three stages", ("gpipe", "1f1b-fold", "wavek", "1f1b-2nd")),
            )
            for schedule in schedules
        ),
    ],
)
def test_gradients_equal_the_double_backward(pool: RankPool, layout: str, schedule: str) -> None:
    size = {"two stages": 2, "three stages": 3, "everything": 4}[layout]
    results = pool.run(train_like_reference, layout, schedule, [1, 2, 3, 4, 5, 6, 7, 8], world_size=size)
    assert all(len(largest) == 8 for largest, _ in results)
    assert max(largest[-1] for largest, _ in results) > 1e-3


@pytest.mark.parametrize(
    ("schedule", "layout", "size"),
    [
        ("wavek-zb", "four stages", 2),
        ("wavek-zb", "eight stages", 2),
        ("wavek-zb", "eight stages", 4),
        ("1f1b-2nd", "four stages", 2),
        ("1f1b-2nd", "eight stages", 4),
        ("hanayo-2nd", "eight stages", 2),
        ("hanayo-2nd", "eight stages", 4),
    ],
)
def test_several_stages_on_a_rank(pool: RankPool, schedule: str, layout: str, size: int) -> None:
    results = pool.run(train_like_reference, layout, schedule, [5, 8, 1], world_size=size)
    assert all(min(largest) > 1e-3 for largest, _ in results)
    assert any(num_split for _, num_split in results) == (schedule in UNFOLDED), "stages should be split"


@pytest.mark.parametrize(
    "layout",
    [
        "observables in several stages",
        "energies in several stages",
        "boundary without a gradient",
        "integers in the boundary",
        "frozen middle",
    ],
)
def test_gradients_of_other_chains(pool: RankPool, layout: str) -> None:
    for schedule in ("wavek", "wavek-zb", "1f1b-2nd"):
        pool.run(train_like_reference, layout, schedule, [5, 2], world_size=3)


@pytest.mark.parametrize(
    ("layout", "schedule", "size"),
    [("two stages", "wavek", 2), ("everything", "wavek-zb", 4), ("eight stages", "wavek-zb", 2)]
    + [("four stages", "1f1b-2nd", 2), ("eight stages", "hanayo-2nd", 2)],
)
def test_evaluate(pool: RankPool, layout: str, schedule: str, size: int) -> None:
    compared = pool.run(evaluate_like_reference, layout, schedule, 3, world_size=size)
    assert sorted(compared) == [*[0] * (size - 1), 6], "one rank has the results"


def test_one_stage_in_one_process() -> None:
    executor, functions, gradients = make_executor_alone()
    inputs = unequal_inputs(3)
    plan = build_schedule("gpipe", 1, 3, PhaseCosts(1, 1, 2, 2))
    executor.run(plan, inputs, lambda _, y, x: loss_gradients(y, x))
    expected = [double_backward(functions, i.tensors).gradients for i in inputs]
    for parameter in functions[0].parameters:
        assert_close(gradients.get(parameter), sum(e[parameter] for e in expected), "gradient")


def test_error_in_the_loss_leaves_nothing_in_flight() -> None:
    executor, _, _ = make_executor_alone()
    plan = build_schedule("gpipe", 1, 2, PhaseCosts(1, 1, 2, 2))

    def loss(*_: object) -> None:
        raise FloatingPointError("the loss is not finite")

    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        executor.run(plan, unequal_inputs(2), loss)  # type: ignore[arg-type]
    assert num_inflight(executor) == 0


def test_a_dead_rank_is_noticed_at_once() -> None:
    """Far within the timeout of 60 s, both neighbours say what they waited for and from whom."""
    with pool_of(3) as own:  # a dead rank ends its pool
        own.run(abs, 1)  # start the processes; not part of the time
        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1: rank 1 died") as error:
            own.run(step_with_a_dead_rank, 1)
        elapsed = time.monotonic() - began
    assert elapsed < 20, f"the others ended after {elapsed:.0f} s"
    first, _, last = ("\n" + str(error.value)).split("\nrank ")[1:]
    for text, stage, message in (
        (first, 0, r"BE message of micro-batch \d from stage 1 to 0"),
        (last, 2, "BF message of micro-batch 1 from stage 1 to 2"),
    ):
        assert text.startswith(f"{stage}: "), text
        waited = (
            rf"RankLostError: global rank {stage} waited \d+\.\d s for global rank 1, which did not come \({message}"
        )
        assert re.search(waited, text) and "That rank has ended or hangs" in text, text


def test_a_hanging_rank_is_noticed_after_the_timeout(pool: RankPool) -> None:
    results = pool.run(step_with_a_hanging_rank, 1, 2.0, 7.0, world_size=2)
    text, elapsed, empty = results[0]
    assert re.match(
        r"global rank 0 waited 2\.\d s for global rank 1, which did not come \(BE message of micro-batch", text
    )
    assert "ended or hangs" in text
    assert 1.5 < elapsed < 6.9
    assert empty, "micro-batches are left in flight"
