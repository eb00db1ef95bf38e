"""LightningModules that users write by themselves train as in one process, without a change."""

from __future__ import annotations

from typing import Any

import plain_modules
import pytest

from lightning_januspipe.testing import RankError, RankPool, compare_records, train_in_pipeline, train_undivided


@pytest.mark.parametrize(
    ("module", "size", "more"),
    [
        (plain_modules.InStep, 2, {}),
        (plain_modules.InStep, 3, {"num_microbatches": 1}),
        (plain_modules.OwnForward, 2, {}),
        (plain_modules.Explicit, 2, {}),
        (plain_modules.Explicit, 3, {"stages": "explicit", "num_microbatches": 1}),
        (plain_modules.Explicit, 4, {"stages": "explicit", "pipeline_size": 2, "schedule": "1f1b-2nd"}),
    ],
)
def test_parity(pool: RankPool, module: Any, size: int, more: dict[str, Any]) -> None:
    strategy = {"num_microbatches": 2, **more}
    results = pool.run(train_in_pipeline, module, plain_modules.Data, strategy, 3, {}, world_size=size)
    (reference,) = pool.run(train_undivided, module, plain_modules.Data, strategy, 3, {}, size, world_size=1)
    compare_records(reference, results, 1e-9)


@pytest.mark.parametrize("kind", [plain_modules.InStep, plain_modules.Reducing])
def test_validation_in_training(pool: RankPool, kind: Any) -> None:
    results = pool.run(plain_modules.with_validation, {"num_microbatches": 1}, kind, world_size=2)
    (expected,) = pool.run(plain_modules.with_validation, None, kind, world_size=1)
    assert len(expected) == 3 and len(set(expected)) == 3
    for found in results:
        assert found == pytest.approx(expected, rel=1e-9)


def test_validation_of_another_energy_is_refused(pool: RankPool) -> None:
    with pytest.raises(RankError, match="differs from the module itself.*in evaluation mode output"):
        pool.run(plain_modules.with_validation, {"num_microbatches": 1}, plain_modules.OtherEvaluation, world_size=2)
