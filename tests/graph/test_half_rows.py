"""Rows that travel in half precision are rounded relative to the rows of their type, in half the bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import graph_models
import half_workers as workers
import pytest
import torch
from expert_workers import experts, train_with_guests
from parity_check import check_parity
from pools import slow

from lightning_januspipe.graph.half_rows import RowLayout
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rounding_is_relative_to_the_largest_number_of_a_type(
    pool: RankPool, dtype: torch.dtype, tolerance: float
) -> None:
    for found in pool.run(workers.exchanged, dtype, True, world_size=2):
        assert found["error"] <= tolerance * 1.01  # the scale is a number of float32
        assert found["bytes"] == found["scales"] + found["exact"] // 4  # of float64


def test_with_one_scale_small_numbers_of_other_types_are_lost(pool: RankPool) -> None:
    assert max(found["error"] for found in pool.run(workers.exchanged, torch.float16, False, world_size=2)) > 0.01


def test_both_ends_of_a_message_have_the_same_scales() -> None:
    sent = RowLayout.of(torch.tensor([7, 2, 7, 2]), (3, 1))
    received = RowLayout.of(torch.tensor([5, 5, 7, 2, 7]), (2, 3))
    assert sent.num_scales == (2, 1) and received.num_scales == (1, 2)
    assert sent.scale.tolist() == [1, 0, 1, 2] and received.scale.tolist() == [0, 0, 2, 1, 2]
    assert RowLayout.of(torch.tensor([], dtype=torch.int64), (0, 0)).num_scales == (0, 0)


@pytest.mark.parametrize(
    ("module", "strategy"),
    [
        (partial(experts, 2), {"graph_size": 2, "expert_size": 2, "exchange_dtype": "fp16"}),
        slow(partial(experts, 1), {"data_size": 2, "expert_size": 2, "exchange_dtype": "bf16"}),
        slow(partial(experts, 1), {"data_size": 2, "expert_size": 2, "exchange_dtype": "fp16", "shard": "parameters"}),
        slow(
            partial(experts, 2),
            {"data_size": 2, "expert_size": 2, "exchange_dtype": "fp16", "expert_placement": "replicate"},
        ),
        slow(graph_models.attention, {"graph_size": 2, "exchange_dtype": "fp16"}),  # the largest are compared exactly
    ],
)
def test_training_is_close_to_that_of_one_process(pool: RankPool, module: Any, strategy: dict[str, Any]) -> None:
    more: dict[str, Any] = {"pipeline_size": 1, "num_microbatches": 2, **strategy}
    if strategy.get("expert_placement") == "replicate":
        more["train"] = train_with_guests
    check_parity(pool, 2, graph_models.Data, module, steps=1, tolerance=0.02, **more)
    with pytest.raises(AssertionError, match="differs by|instead of"):  # rows are rounded
        check_parity(pool, 2, graph_models.Data, module, steps=1, tolerance=1e-7, **more)
