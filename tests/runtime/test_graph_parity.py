"""Training with micro-batches sharded over graph ranks equals training in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import graph_models
import pytest
import tiny
from parity_check import check_parity
from pools import pool_of, slow

from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize("devices", [slow(2), 3, slow(4)])
def test_graph_ranks_alone(pool: RankPool, devices: int) -> None:
    check_parity(pool, devices, pipeline_size=1, graph_size=devices, num_microbatches=2)


@pytest.mark.parametrize("schedule", ["wavek-zb", slow("1f1b-fold"), "1f1b-2nd"])
def test_graph_ranks_in_a_pipeline(pool: RankPool, schedule: str) -> None:
    check_parity(pool, 4, pipeline_size=2, graph_size=2, num_microbatches=4, schedule=schedule)


@pytest.mark.parametrize(
    ("devices", "more"),
    [(4, {"graph_size": 2}), slow(2, {}), slow(3, {"pipeline_size": 3})],
)
def test_several_tasks(pool: RankPool, devices: int, more: dict[str, Any]) -> None:
    options: dict[str, Any] = {"pipeline_size": 2, "num_microbatches": 2, **more}
    check_parity(pool, devices, tiny.tasks_data, tiny.tasks_module, **options)


def test_graph_ranks_and_replicas(pool: RankPool) -> None:
    check_parity(pool, 4, pipeline_size=1, data_size=2, graph_size=2, num_microbatches=2)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (graph_models.both_ways, {"pipeline_size": 1}),
        slow(graph_models.states, {"pipeline_size": 1}),
        (graph_models.states, {"pipeline_size": 2}),
        (graph_models.angles, {"pipeline_size": 2, "num_microbatches": 1}),
        (graph_models.attention, {"pipeline_size": 1}),
        (graph_models.peaks, {"pipeline_size": 1}),
        (graph_models.composed, {"pipeline_size": 1}),
        (graph_models.mixture, {"pipeline_size": 2}),
    ],
)
def test_atoms_joined_in_other_ways(pool: RankPool, module: object, more: dict[str, int]) -> None:
    check_parity(
        pool, 2 * more["pipeline_size"], graph_models.Data, module, **{"graph_size": 2, "num_microbatches": 2, **more}
    )


@pytest.mark.parametrize("strategy", [slow({"pipeline_size": 1}), slow({"pipeline_size": 2})])
def test_water(pool: RankPool, strategy: dict[str, int]) -> None:
    """Boxes that no rank can have as a whole: every layer reads rows of other ranks."""
    tiny.require("water.extxyz")
    check_parity(
        pool, 2 * strategy["pipeline_size"], tiny.water, tiny.water_module, graph_size=2, num_microbatches=2, **strategy
    )


@pytest.mark.parametrize(
    "strategy", [slow({"graph_size": 2}), {"graph_size": 4}, slow({"graph_size": 2, "pipeline_size": 2})]
)
def test_odd_structures(pool: RankPool, strategy: dict[str, int]) -> None:
    """Vacuum, wires, cells smaller than the cutoff, atoms without edges, and more ranks than atoms."""
    sizes = {"pipeline_size": 1, "num_microbatches": 4, **strategy}
    module = partial(tiny.module, stress_weight=0.0)
    check_parity(pool, sizes["pipeline_size"] * sizes["graph_size"], tiny.OddStructures, module, **sizes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_dimensions() -> None:
    """Two stages, two replicas and two graph ranks."""
    with pool_of(8) as pool:
        check_parity(pool, 8, pipeline_size=2, data_size=2, graph_size=2, num_microbatches=2)
