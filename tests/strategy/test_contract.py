"""What modules, callbacks and loaders of users do beside training: it works as in plain Lightning, or is refused."""

from __future__ import annotations

import contract_workers as workers
import pytest
from pools import slow

from lightning_januspipe.testing import RankPool


def test_random_numbers_move_on_and_are_shared(pool: RankPool) -> None:
    first, second = pool.run(workers.random_numbers, {"num_microbatches": 2}, world_size=2)
    assert sorted(first) == sorted(second), "the ranks drew other numbers"
    assert len(first) == len(set(first)) == 6, "micro-batches or steps drew the same numbers"


@pytest.mark.parametrize(
    ("how", "validate_first"),
    [
        ("submodule", True),
        *((how, False) for how in ("submodule", "directly", "embedding")),
        *(slow(how, True) for how in ("directly", "embedding")),
    ],
)
def test_parameters_read_past_the_potential(pool: RankPool, how: str, validate_first: bool) -> None:
    for message in pool.run(workers.outside_parameters, how, validate_first, world_size=2):
        assert "CaptureError" in message and "outside the potential" in message, message


def test_freezing_in_the_middle(pool: RankPool) -> None:
    for message in pool.run(workers.unfrozen, world_size=2):
        assert message.startswith("ValueError") and "requires_grad" in message and "layers.0" in message


def test_several_training_loaders(pool: RankPool) -> None:
    for message in pool.run(workers.several_loaders, world_size=2):
        assert message.startswith("ValueError") and "several loaders" in message


def test_attributes_are_as_if_never_captured(pool: RankPool) -> None:
    first, second = pool.run(workers.collected_outputs, world_size=2)
    assert first == second and first["calls"] == len(first["losses"]) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_loader_for_training_and_validation(pool: RankPool, num_workers: int) -> None:
    for found in pool.run(workers.one_loader_for_both, num_workers, world_size=2):
        assert found["types"] == {"dict"}, "the hook saw something else than batches"
        assert found["collate"], "the user's loader was changed"
        assert found["copied"]
        assert "val_loss" in found["metrics"] and "train_loss" in found["metrics"]


def test_the_same_optimizer_for_two_fits(pool: RankPool) -> None:
    (first, second), other = pool.run(workers.same_optimizer_twice, world_size=2)
    assert first == second > 20
    assert other == [0, 0], "one rank writes, so one gathers"
