"""Faults of data and gradients are errors at the step where they show, and a finished Trainer leaves nothing behind."""

from __future__ import annotations

import re
from typing import Any

import fault_workers as workers
import pytest
from pools import slow

from lightning_januspipe.testing import RankPool

REPLICAS: dict[str, Any] = {"pipeline_size": 1, "data_size": 2}
MESH: dict[str, Any] = {"pipeline_size": 2, "data_size": 2}


@pytest.mark.parametrize(
    ("kind", "strategy", "sizes"),
    [
        ("map", REPLICAS, {0: 5, 1: 3}),
        ("iterable", REPLICAS, {0: 3, 1: 5}),
        ("wrong length", REPLICAS, {0: 5, 1: 3}),
        slow("map", MESH, {0: 3, 1: 5}),
        slow("iterable", MESH, {0: 5, 1: 3}),
        slow("wrong length", MESH, {0: 3, 1: 5}),
    ],
)
def test_replicas_with_unequal_numbers_of_batches(
    pool: RankPool, kind: str, strategy: dict[str, Any], sizes: dict[int, int]
) -> None:
    """All ranks end with one error after the last batch that all have."""
    size = strategy["pipeline_size"] * 2
    for error, steps, seconds in pool.run(workers.unequal, kind, strategy, sizes, world_size=size, timeout=150):
        assert error.startswith("PipelineError: the replicas have unequal numbers of training batches: in epoch 0"), (
            error
        )
        assert re.search(r"after \d of replica 0, \d of replica 1", error) or "after 3 of replica 0, 3" in error, error
        assert steps == (3 if kind == "wrong length" else 2) and seconds < 50


def test_replicas_with_equal_numbers_of_batches(pool: RankPool) -> None:
    """Also where the number is less than the loader says: nothing is refused."""
    for kind in ("iterable", "wrong length"):
        for error, steps, _ in pool.run(workers.unequal, kind, REPLICAS, {0: 3, 1: 3}, world_size=2):
            assert (error, steps) == ("", 6)


@pytest.mark.parametrize("strategy", [slow(REPLICAS), {"pipeline_size": 2}], ids=["replicas", "pipeline"])
def test_a_gradient_that_is_not_finite(pool: RankPool, strategy: dict[str, Any]) -> None:
    """It is named in its own step: rank and parameter."""
    (other, _), (own, step) = pool.run(workers.bad_gradient, strategy, 1, 1, world_size=2, timeout=150)
    assert re.match(r"FloatingPointError: on global rank 1 the gradient of potential\.\S+.* is NaN or inf", own), own
    assert step == 1
    # Stages send each other gradients, so the first one may find them, too, before it hears that the other has ended.
    is_found = strategy != REPLICAS and other.startswith("FloatingPointError: on global rank 0 the gradient of")
    assert is_found or re.match(r"RankLostError: global rank 0 waited \d+\.\d s for global rank 1", other), other


@pytest.mark.parametrize("strategy", [slow(REPLICAS), {"pipeline_size": 2}], ids=["replicas", "pipeline"])
def test_finished_trainers_give_everything_back(pool: RankPool, strategy: dict[str, Any]) -> None:
    """Process groups, with their descriptors and threads: of seven Trainers, no more are left than of two."""
    for found in pool.run(workers.fits, strategy, 7, world_size=2):
        assert max(found[2:]) <= found[1], found
        assert len(set(found[2:])) == 1, found
