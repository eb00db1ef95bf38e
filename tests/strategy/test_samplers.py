"""Samples are shared among replicas in the user's order, and each is evaluated once."""

from __future__ import annotations

import evaluation_workers as workers
import pytest
from pools import slow

from lightning_januspipe.testing import RankError, RankPool

pytestmark = pytest.mark.filterwarnings("ignore")

REPLICAS = {"pipeline_size": 1, "num_microbatches": 1}
PIPELINE = {"pipeline_size": 2, "num_microbatches": 2}


@pytest.mark.parametrize(
    ("strategy", "world", "num", "batch_size", "budget"),
    [
        slow(REPLICAS, 2, 5, 2, None),  # three and two structures
        (REPLICAS, 4, 5, 8, None),
        (REPLICAS, 3, 2, 8, None),  # none is left for the last replica
        (REPLICAS, 2, 5, 8, 16),  # batches by numbers of atoms
        (REPLICAS, 3, 1, 8, 16),
        slow(PIPELINE, 2, 5, 2, None),
        (PIPELINE, 4, 5, 2, None),  # two pipelines
    ],
)
def test_each_structure_is_evaluated_once(
    pool: RankPool, strategy: dict, world: int, num: int, batch_size: int, budget: int | None
) -> None:
    (expected,) = pool.run(workers.evaluated, None, num, 1, world_size=1)
    assert {"test_loss", "val_loss", "test_energy_rmse", "val_stress_mae"} <= set(expected)
    for found in pool.run(workers.evaluated, strategy, num, batch_size, budget, world_size=world):
        assert found == pytest.approx(expected, rel=1e-9)


EXPERTS = {**REPLICAS, "expert_size": 2}


def test_validation_where_replicas_evaluate_together(pool: RankPool) -> None:
    """Experts are spread over replicas, so that these have as many batches; one structure is repeated for that."""
    (expected,) = pool.run(workers.validated_in_training, None, 4, world_size=1)
    assert pool.run(workers.validated_in_training, EXPERTS, 4, world_size=2) == pytest.approx([expected] * 2, rel=1e-9)
    first, second = pool.run(workers.validated_in_training, EXPERTS, 5, world_size=2)
    assert first == second > 0
    with pytest.raises(RankError, match=r"validation batches \(\[1\] of replica 0, \[2\] of replica 1"):
        pool.run(workers.validated_in_training, EXPERTS, 8, (1, 2), world_size=2)


def test_every_form_of_logging_counts_each_sample_once(pool: RankPool) -> None:
    nums = (5, 2, 7)  # the third replica has no sample of the second loader
    expected = [
        {
            "mean": (n + 1) / 2,
            "min": 1.0,
            "max": float(n),
            "torchmetrics_mean": (n + 1) / 2,
            "torchmetrics_sum": n * (n + 1) / 2,
        }
        for n in nums
    ]
    for ranks in pool.run(workers.logged, REPLICAS, nums, world_size=3):
        for index, (found, values) in enumerate(zip(ranks, expected, strict=True)):
            values = {f"{name}/dataloader_idx_{index}": value for name, value in values.items()}
            assert {name: found[name] for name in values} == pytest.approx(values, rel=1e-6)
            assert found[f"sum/dataloader_idx_{index}"] == pytest.approx(nums[index] * (nums[index] + 1) / 2)


@pytest.mark.parametrize("shuffle", [slow(False), True])
def test_order_of_training_samples(pool: RankPool, shuffle: bool) -> None:
    """Without shuffling a step has the samples that it has in one process; with it, replicas share what is shuffled."""
    (alone,) = pool.run(workers.order, None, shuffle, world_size=1)
    pipelines = pool.run(workers.order, PIPELINE, shuffle, world_size=2)
    assert pipelines[0] == pipelines[1]
    first, second = pool.run(workers.order, {**REPLICAS, "balance": "microbatches"}, shuffle, world_size=2)
    joined = [sorted(a + b) for a, b in zip(first, second, strict=True)]
    everything = sorted(energy for step in alone[:3] for energy in step)
    for steps in (alone, pipelines[0]):
        assert sorted(energy for step in steps[:3] for energy in step) == everything
        assert (steps[:3] == steps[3:]) == (not shuffle)
    assert sorted(energy for step in joined[: len(joined) // 2] for energy in step) == everything
    if not shuffle:
        assert pipelines[0] == alone
        assert [sorted(a + b) for a, b in zip(alone[:2:2], alone[1:2:2], strict=True)] == joined[:1]
        assert joined[1] == alone[2]
