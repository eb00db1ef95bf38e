"""Loaders: split their batches into micro-batches, seed their workers, and take samples from them for capture."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_januspipe.engine.microbatch import MicroBatchCollate, sample_cost

_NUM_SAMPLES = 12


def split_batches(loader: Any, num_microbatches: int, required: bool) -> Any:
    """A loader that gives :class:`~lightning_januspipe.engine.microbatch.MicroBatches`.

    The user's loader is not changed: it may serve for validation too.

    Args:
        loader: the user's loader.
        num_microbatches: into how many.
        required: whether the user asked for this number, so that a loader that cannot be split is an error.

    Returns:
        A copy that splits, or the loader itself where one micro-batch is wanted or it cannot be split.

    Raises:
        ValueError: the loader collates nothing, so that its batches cannot be split.
    """
    if num_microbatches == 1:
        return loader
    if not isinstance(loader, DataLoader) or (loader.batch_sampler is None and loader.batch_size is None):
        if required:
            raise ValueError(
                f"num_microbatches={num_microbatches}, but the training loader ({type(loader).__name__}) gives "
                "ready-made batches without collating samples, so they cannot be split. Use a torch DataLoader "
                "with a batch_size or batch_sampler, or num_microbatches=1 with accumulate_grad_batches."
            )
        return loader
    split = copy.copy(loader)
    split._iterator = None  # workers that persist belong to the user's loader
    split.collate_fn = MicroBatchCollate(loader.collate_fn, num_microbatches)
    return split


def require_samples(loader: Any) -> None:
    """Refuse a training loader without samples.

    Raises:
        ValueError: it has none.
    """
    dataset = getattr(loader, "dataset", None)
    if (
        dataset is not None
        and not isinstance(dataset, IterableDataset)
        and hasattr(dataset, "__len__")
        and not len(dataset)
    ):
        raise ValueError(
            f"the training dataset ({type(dataset).__name__}) is empty; check its file, its split sizes and its filters"
        )


def seed_workers(loader: Any, worker_init: Callable[..., None], data_rank: int) -> None:
    """Seed workers by the data-parallel rank, so that the ranks of one pipeline see the same random transforms."""
    if isinstance(loader, DataLoader) and loader.worker_init_fn is None and os.environ.get("PL_SEED_WORKERS") == "1":
        loader.worker_init_fn = partial(worker_init, rank=data_rank)


def example_batches(loader: Any, num_microbatches: int) -> tuple[Any, Any]:
    """Two batches for capture, collated by the loader's own function: one to trace, one to validate and profile on.

    They hold different numbers of samples; the first has at least two, the second about as many as a micro-batch.

    Raises:
        ValueError: the loader gives no samples.
    """
    with _same_random_numbers():
        if not isinstance(loader, DataLoader) or (loader.batch_size is None and loader.batch_sampler is None):
            batches = list(islice(iter(loader), 2))
            if not batches:
                raise ValueError("the loader gives no batches")
            return batches[0], batches[-1]
        collate = loader.collate_fn.collate if isinstance(loader.collate_fn, MicroBatchCollate) else loader.collate_fn
        samples = _samples(loader.dataset)
        if not samples:
            raise ValueError("the dataset gives no samples")
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 2 * num_microbatches
        num_other = max(1, round(batch_size / num_microbatches))
        num_traced = 3 if num_other == 2 else 2
        ordered = sorted(samples, key=sample_cost)
        middle = [ordered[len(ordered) * (2 * i + 1) // (2 * num_other)] for i in range(num_other)]
        largest = [ordered[-1 - i % len(ordered)] for i in range(num_traced)]
        return collate(largest), collate(middle)


def _samples(dataset: Any) -> list[Any]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return list(islice(iter(dataset), _NUM_SAMPLES))
    num = len(dataset)
    return [dataset[i * num // min(num, _NUM_SAMPLES)] for i in range(min(num, _NUM_SAMPLES))]


def without_inference(value: Any) -> Any:
    """The same batch with tensors that autograd accepts."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(without_inference(v) for v in value))
    if isinstance(value, Mapping):
        changed = copy.copy(value)
        changed.update({k: without_inference(v) for k, v in value.items()})  # type: ignore[attr-defined]
        return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{n: without_inference(getattr(value, n)) for n in fields})
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(without_inference(v) for v in value)
    if hasattr(value, "apply") and not isinstance(value, nn.Module):  # PyG data
        return value.apply(without_inference)
    return value


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Looking at samples must not change which ones training sees."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
