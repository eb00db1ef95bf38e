"""Training with eager phases that keep boundaries only, or keep values on the host, equals training in one process."""

from __future__ import annotations

import pipeline_workers
import pytest
from parity_check import check_parity
from pools import slow

from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        slow(1, {"num_microbatches": 2}),
        (2, {"num_microbatches": 4}),
        slow(2, {"num_microbatches": 4, "schedule": "1f1b-fold"}),
        slow(2, {"num_microbatches": 2, "pipeline_size": 1, "data_size": 2}),
        slow(2, {"num_microbatches": 2, "graph_size": 2}),
        slow(4, {"num_microbatches": 4, "pipeline_size": 2, "graph_size": 2}),
        (2, {"num_microbatches": 4, "activation": "offload"}),
        slow(1, {"num_microbatches": 2, "activation": "offload"}),
        slow(2, {"num_microbatches": 4, "schedule": "gpipe", "activation": "offload"}),
        slow(2, {"num_microbatches": 2, "pipeline_size": 1, "graph_size": 2, "activation": "offload"}),
        slow(4, {"num_microbatches": 4, "pipeline_size": 2, "graph_size": 2, "activation": "offload"}),
    ],
)
def test_parity(pool: RankPool, devices: int, strategy: dict[str, object]) -> None:
    check_parity(pool, devices, **{"activation": "recompute", **strategy})


def test_a_memory_limit_chooses_what_is_kept(pool: RankPool) -> None:
    """Nothing fits with all tensors kept, so that both ranks compute again."""
    ranks = pool.run(pipeline_workers.fit, {"num_microbatches": 8, "memory_limit": 4.5e5}, world_size=2)
    for found in ranks:
        assert max(memory.total for memory in found["memory"]) < 1e5
        assert set(found["kinds"]) == {"RecomputingStage"}
    check_parity(pool, 2, num_microbatches=8, memory_limit=4.5e5)
