"""Pipelined training equals training in one process: gradients, losses and parameters of three optimizer steps.

The epoch has batches of 8, 8 and 4 structures of unequal size, so the last batch is smaller, and with eight
micro-batches has fewer samples than these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import mutants
import pytest
import tiny
from parity_check import check_parity
from pools import slow

from lightning_januspipe.testing import RankPool

SCHEDULES = ("gpipe", "1f1b-fold", "wavek", "wavek-zb", "1f1b-2nd", "hanayo-2nd")


@pytest.mark.parametrize("num_microbatches", [1, slow(2), slow(4), 8])
def test_one_process(pool: RankPool, num_microbatches: int) -> None:
    check_parity(pool, 1, num_microbatches=num_microbatches)


def all_but(default: Sequence[tuple[object, ...]], cases: Iterable[tuple[object, ...]]) -> list[object]:
    """Returns all cases; a case is slow if it takes no other path than the default cases."""
    return [case if case in default else slow(*case) for case in cases]


EACH_SCHEDULE = [("gpipe", 8), ("1f1b-fold", 4), ("wavek", 1), ("wavek-zb", 4), ("1f1b-2nd", 8), ("hanayo-2nd", 4)]


@pytest.mark.parametrize(("schedule", "num_microbatches"), all_but(EACH_SCHEDULE, product(SCHEDULES, [1, 4, 8])))
def test_two_ranks(pool: RankPool, schedule: str, num_microbatches: int) -> None:
    check_parity(pool, 2, num_microbatches=num_microbatches, schedule=schedule)


@pytest.mark.parametrize(
    ("devices", "schedule"),
    all_but([(4, "wavek"), (3, "wavek-zb")], [*((4, s) for s in SCHEDULES), (3, "wavek-zb"), (3, "wavek")]),
)
def test_more_ranks(pool: RankPool, devices: int, schedule: str) -> None:
    check_parity(pool, devices, num_microbatches=8, schedule=schedule)


@pytest.mark.parametrize(("devices", "num_microbatches"), all_but([(3, 1)], product([3, 4], [1, 2, 4])))
def test_more_ranks_and_fewer_microbatches(pool: RankPool, devices: int, num_microbatches: int) -> None:
    """Radial basis, scale and shift are trained too on three ranks."""
    module = tiny.shared_module if devices == 3 else tiny.module
    check_parity(pool, devices, module=module, num_microbatches=num_microbatches)


@pytest.mark.parametrize(
    ("num_microbatches", "schedule"), [slow(1, "wavek-zb"), slow(4, "1f1b-2nd"), slow(4, "1f1b-fold"), (8, "wavek-zb")]
)
def test_two_stages_and_two_replicas(pool: RankPool, num_microbatches: int, schedule: str) -> None:
    check_parity(pool, 4, pipeline_size=2, num_microbatches=num_microbatches, schedule=schedule)


def test_two_replicas_without_a_pipeline(pool: RankPool) -> None:
    """With Huber losses."""
    check_parity(pool, 2, module=tiny.huber_module, pipeline_size=1, data_size=2, num_microbatches=2)


@pytest.mark.parametrize("devices", [2, slow(4)])
def test_water(pool: RankPool, devices: int) -> None:
    tiny.require("water.extxyz")
    check_parity(pool, devices, data=tiny.water, module=tiny.water_module, num_microbatches=2)


@pytest.mark.parametrize("devices", [slow(2), 3])
def test_ethanol(pool: RankPool, devices: int) -> None:
    tiny.require("ethanol.extxyz")
    check_parity(pool, devices, data=tiny.ethanol, module=tiny.ethanol_module, num_microbatches=4)


@pytest.mark.parametrize(
    "trainer",
    [slow({"gradient_clip_val": 0.05}), {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}],
    ids=["norm", "value"],
)
def test_gradient_clipping(pool: RankPool, trainer: dict[str, object]) -> None:
    """By the norm below too, where stages share parameters."""
    check_parity(pool, 2, trainer=trainer)


@pytest.mark.parametrize("devices", [slow(2), 4])
def test_accumulation_over_batches(pool: RankPool, devices: int) -> None:
    """Three batches in an epoch, so the second optimizer step of an epoch accumulates one batch only."""
    check_parity(pool, devices, trainer={"accumulate_grad_batches": 2}, pipeline_size=2)


@pytest.mark.parametrize("schedule", ["wavek-zb", "1f1b-2nd"])
def test_parameters_that_several_stages_read(pool: RankPool, schedule: str) -> None:
    """Their gradients are summed over the stages, and clipping counts them once."""
    check_parity(pool, 2, module=mutants.tied_module, trainer={"gradient_clip_val": 0.05}, schedule=schedule)
