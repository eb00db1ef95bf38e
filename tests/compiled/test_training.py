"""Training with compiled phases equals training in one process; most tests run the phase graphs uncompiled."""

from __future__ import annotations

import pytest
from compiled_workers import train_interpreted, train_on_graph_ranks
from parity_check import check_parity
from pools import slow

from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (1, {"num_microbatches": 4}),
        (2, {"schedule": "wavek-zb", "num_microbatches": 4}),
        slow(2, {"schedule": "wavek", "num_microbatches": 4, "activation": "keep"}),
        slow(2, {"schedule": "gpipe", "num_microbatches": 2, "activation": "recompute"}),
        slow(2, {"schedule": "1f1b-fold", "num_microbatches": 8}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "shard": "optimizer"}),
        (2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "shard": "parameters"}),
        slow(4, {"pipeline_size": 2, "data_size": 2, "num_microbatches": 4, "shard": "parameters"}),
        slow(4, {"pipeline_size": 2, "schedule": "wavek-zb", "num_microbatches": 4}),
    ],
)
def test_parity(pool: RankPool, devices: int, strategy: dict[str, object]) -> None:
    check_parity(pool, devices, train=train_interpreted, compile=True, **strategy)


def test_stages_of_graph_ranks_run_eagerly(pool: RankPool) -> None:
    """Their exchanges are not part of the graphs, and nothing is compiled."""
    check_parity(pool, 2, train=train_on_graph_ranks, compile=True, graph_size=2, num_microbatches=2)
