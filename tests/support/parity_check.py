"""The comparison of a pipeline with one process, which trains once for all pipelines with the same micro-batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import tiny
import torch

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.testing import RankPool, RunRecord, compare_records, train_in_pipeline, train_reference

_REFERENCES: dict[bytes, RunRecord] = {}


def check_parity(
    pool: RankPool,
    devices: int,
    data: Callable[[], Any] = tiny.data,
    module: Callable[[], Any] = tiny.module,
    trainer: dict[str, Any] | None = None,
    steps: int = 3,
    reference: Callable[[], Any] | None = None,
    train: Callable[..., RunRecord] = train_in_pipeline,
    tolerance: float = 1e-9,
    limit: float = 300.0,
    **strategy: Any,
) -> list[Any]:
    """Trains in a pipeline, and compares losses, gradients and parameters with those of one process.

    Args:
        pool: The processes.
        devices: The number of ranks of the pipeline.
        data: Makes the data.
        module: Makes the module.
        trainer: Further arguments of both Trainers.
        steps: Optimizer steps.
        reference: Makes the module of the one process, if that is another.
        train: Trains as one rank of the pipeline.
        tolerance: The largest difference, relative to the largest entry.
        limit: Seconds after which the ranks are killed.
        strategy: Arguments of the strategy.

    Returns:
        What ``train`` returned, by rank.
    """
    more = (steps, trainer or {})
    ranks = pool.run(train, module, data, strategy, *more, world_size=devices, timeout=limit)
    bound = JanusPipeStrategy(**strategy)
    bound.parallel_devices = [torch.device("cpu")] * devices
    replicas = bound.mesh_shape.data
    sizes = {"pipeline_size": 1, "data_size": replicas, "num_microbatches": bound.num_microbatches()}
    given = (reference or module, data, {**sizes, "balance": strategy.get("balance", "auto")}, *more, replicas)
    key = pickle.dumps(given)
    if key not in _REFERENCES:
        (_REFERENCES[key],) = pool.run(train_reference, *given, world_size=1)
    compare_records(_REFERENCES[key], ranks, tolerance)
    return ranks
