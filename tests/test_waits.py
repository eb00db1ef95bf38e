"""A rank that stops for good: all others end within their timeout and some seconds, and say for whom they waited."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import wait_workers as workers
from pools import pool_of, slow

from lightning_januspipe.testing import RankError

TIMEOUT = 4.0
MESHES = {
    "P2": {"pipeline_size": 2},
    "D2": {"pipeline_size": 1, "data_size": 2},
    "G2": {"pipeline_size": 1, "graph_size": 2},
    "D2shards": {"pipeline_size": 1, "data_size": 2, "shard": "optimizer"},
    "P2D2": {"pipeline_size": 2, "data_size": 2},
    "P2folder": {"pipeline_size": 2, "save_distributed_checkpoint": True},
}
DEFAULT = [("P2", 1, "before the reduction")]
REST = [
    (mesh, rank, place)
    for mesh, ranks in {"P2": (0, 1), "D2": (1,), "D2shards": (1,), "G2": (1,), "P2D2": (3,), "P2folder": (1,)}.items()
    for rank in ranks
    for place in workers.PLACES
    if (mesh, rank, place) not in DEFAULT
    and (mesh != "P2folder" or "saving" in place or "writing" in place)
    and (place != "while writing" or rank == 0 or mesh == "P2folder")
]


@pytest.mark.parametrize(("mesh", "rank", "place"), [*DEFAULT, *(slow(*case) for case in REST)])
def test_a_rank_that_stops(tmp_path: Path, mesh: str, rank: int, place: str) -> None:
    strategy: dict[str, Any] = MESHES[mesh]
    size = 4 if mesh == "P2D2" else 2
    with pool_of(size) as ranks, pytest.raises(RankError, match=f"rank {rank} died"):
        ranks.run(workers.train, strategy, rank, place, str(tmp_path), TIMEOUT, timeout=120)
    found = {int(f.stem): json.loads(f.read_text()) for f in tmp_path.glob("*.json")}
    assert set(found) == set(range(size)) - {rank}
    for other, end in found.items():
        said = rf"RankLostError: global rank {other} waited \d+\.\d s for (one of )?global ranks? [\d, and]+, which"
        assert re.match(said, end["ended"]), end
        assert end["seconds"] < TIMEOUT + 10
    assert any(f"for global rank {rank}," in end["ended"] for end in found.values()), found
