"""LightningModules that users write by themselves train as in one process, without a change."""

from __future__ import annotations

from typing import Any

import graph_models
import plain_modules
import pytest
from pools import InSessionPool

from lightning_januspipe.testing import PotentialConformance, RankPool


class ModuleConformance(InSessionPool, PotentialConformance):
    """Structures of very unequal sizes; all strategies with molecules are in test_testing.py."""

    datamodules = {"one-large": graph_models.Data}


def some(*names: str) -> dict[str, dict[str, Any]]:
    """Returns some of the usual strategies."""
    return {name: dict(PotentialConformance.strategies[name]) for name in names}


class TestInStep(ModuleConformance):
    make_module = plain_modules.InStep
    strategies = {
        **some("two-graph-ranks", "two-stages-of-two-graph-ranks"),
        "three-stages": {"pipeline_size": 3, "num_microbatches": 1},
    }


class TestOwnForward(ModuleConformance):
    make_module = plain_modules.OwnForward
    strategies = some("two-stages-4-microbatches", "two-graph-ranks")


class TestReducing(ModuleConformance):
    make_module = plain_modules.Reducing
    strategies = some("two-replicas")


class TestExplicit(ModuleConformance):
    """Hand-written parts, which call one function for the atoms of other ranks."""

    make_module = plain_modules.Explicit
    strategies = {
        **some("two-stages-4-microbatches", "two-stages-of-two-graph-ranks"),
        "three-stages-of-its-own": {"pipeline_size": 3, "num_microbatches": 1, "stages": "explicit"},
        "three-graph-ranks": {"graph_size": 3, "num_microbatches": 2},
        "split-stages-and-replicas": {
            **{"pipeline_size": 2, "data_size": 2, "num_microbatches": 2},
            **{"stages": "explicit", "schedule": "1f1b-2nd"},
        },
        "split-stages-of-graph-ranks": {
            **{"pipeline_size": 2, "graph_size": 2, "num_microbatches": 2, "schedule": "1f1b-2nd"}
        },
    }


@pytest.mark.parametrize("kind", [plain_modules.InStep, plain_modules.Reducing])
def test_validation_in_training(pool: RankPool, kind: Any) -> None:
    results = pool.run(plain_modules.with_validation, {"num_microbatches": 1}, kind, world_size=2)
    (expected,) = pool.run(plain_modules.with_validation, None, kind, world_size=1)
    assert len(expected) == 3 and len(set(expected)) == 3
    for found in results:
        assert found == pytest.approx(expected, rel=1e-9)


WHOLE: list[tuple[Any, dict[str, Any]]] = [
    (plain_modules.OtherEvaluation, {"num_microbatches": 2}),
    (plain_modules.ValidatesMore, {"num_microbatches": 1}),
    (plain_modules.MadeLater, {"num_microbatches": 1}),
    (plain_modules.OtherEvaluation, {"pipeline_size": 1, "graph_size": 2, "shard": "parameters"}),
]


@pytest.mark.parametrize(("kind", "strategy"), WHOLE)
def test_validation_of_another_energy(pool: RankPool, kind: Any, strategy: dict[str, Any]) -> None:
    """The stages cannot evaluate it, so every rank runs the whole module with the parameters of all ranks."""
    (expected,) = pool.run(plain_modules.with_validation, None, kind, world_size=1)
    assert len(expected) == 3 and len(set(expected)) == 3
    for found in pool.run(plain_modules.with_validation, strategy, kind, world_size=2):
        assert found == pytest.approx(expected, rel=1e-9)
