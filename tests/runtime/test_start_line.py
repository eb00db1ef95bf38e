"""What the line that a start prints says about the ranks."""

from __future__ import annotations

import pytest

from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.runtime.start_line import describe_run


@pytest.mark.parametrize(
    ("num_microbatches", "shape", "words"),
    [
        (4, MeshShape(2, 1, 1), "wavek-zb, 4 micro-batches"),
        (1, MeshShape(2, 2, 1), "wavek-zb, one micro-batch, 2 replicas"),
        (1, MeshShape(1, 1, 4), "no pipeline, one micro-batch, the atoms of each on 4 ranks"),
        (8, MeshShape(4, 2, 2), "wavek-zb, 8 micro-batches, the atoms of each on 2 ranks, 2 replicas"),
    ],
)
def test_how_the_ranks_work_is_told(num_microbatches: int, shape: MeshShape, words: str) -> None:
    assert describe_run("wavek-zb", num_microbatches, shape) == words
