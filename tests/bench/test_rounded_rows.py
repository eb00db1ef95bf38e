"""The benchmark of rounded rows counts half the bytes, and errors of rounding."""

from __future__ import annotations

from typing import Any

from lightning_januspipe.bench.rounded_rows import ExpertWork, gradients_and_bytes
from lightning_januspipe.bench.training_steps import gradient_errors
from lightning_januspipe.testing import RankPool


def test_half_the_bytes_and_the_error_of_rounding(pool: RankPool) -> None:
    work = ExpertWork(num_atoms=8, batch_size=1, num_features=16, cutoff=4.0)
    strategy = {"pipeline_size": 1, "graph_size": 2, "expert_size": 2, "num_microbatches": 1}

    def joined(**more: Any) -> list[Any]:
        return pool.run(gradients_and_bytes, work, {**strategy, **more}, "64-true", world_size=2)

    exact, rounded = joined(), joined(exchange_dtype="fp16")
    whole, _ = gradient_errors(rounded[0].gradients, exact[0].gradients)
    assert 1e-6 < whole < 1e-2
    for a, b in zip(exact, rounded, strict=True):
        assert 0.25 < b.message_bytes / a.message_bytes < 0.3  # of float64; the rest are scales and indices
