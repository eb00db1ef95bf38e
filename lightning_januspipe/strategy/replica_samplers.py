"""Shares the samples of a loader among replicas: in the user's order in training, and each once in evaluation."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_januspipe.strategy.library import Library


def share_samples(
    loader: Any,
    lib: Library,
    num_replicas: int,
    replica: int,
    *,
    trains: bool,
    may_shuffle: bool = True,
    may_repeat: bool = False,
) -> Any:
    """Returns a copy of a loader that gives each replica its samples.

    Lightning's own samplers shuffle training data even if the user does not, and repeat samples in evaluation until all
    replicas have as many.

    Args:
        loader: The loader of a user. It is returned as it is where its samples cannot be shared: if it is no torch
            ``DataLoader``, or has an iterable dataset or a ``DistributedSampler``.
        lib: The modules of the user's Lightning.
        num_replicas: Number of replicas D.
        replica: Index of this replica.
        trains: Whether the loader is for training, where all replicas need as many samples and some are repeated.
            Otherwise each sample is given once; but a replica for which none is left gets one that another has too.
        may_shuffle: Whether samples may be shuffled at all.
        may_repeat: Whether some samples are repeated in evaluation too, until all replicas have as many.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    inner = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    shuffles = isinstance(inner, RandomSampler) or (trains and inner is None)
    is_plain = isinstance(loader.sampler, (RandomSampler, SequentialSampler))
    make: Any = DistributedSampler if is_plain else lib.overrides.DistributedSamplerWrapper
    sampler = make(
        loader.dataset if is_plain else loader.sampler,
        num_replicas=num_replicas,
        rank=replica,
        shuffle=shuffles and may_shuffle,
        seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
    )
    total = len(sampler.dataset)
    if not (trains or may_repeat) and total >= num_replicas:
        sampler.total_size, sampler.num_samples = total, len(range(replica, total, num_replicas))
    return lib.data._update_dataloader(loader, sampler)


def is_repeated(loader: Any, replica: int) -> bool:
    """Returns whether all that a replica evaluates of a loader of :func:`share_samples` is evaluated by another too."""
    dataset: Any = getattr(loader, "dataset", None)
    return isinstance(loader, DataLoader) and 0 < len(dataset) <= replica


def discard_results(results: Any) -> None:
    """Lets the values that a module has logged for the present loader count for nothing in reductions over replicas.

    Args:
        results: The Trainer's collection of results.
    """
    for result in results.values():
        if result.meta.dataloader_idx != results.dataloader_idx:
            continue
        if not result.is_tensor:
            result.value.reset()
            continue
        neutral = -math.inf if result.meta.is_max_reduction else math.inf if result.meta.is_min_reduction else 0.0
        result.value = torch.full_like(result.value, neutral)
        if result.meta.is_mean_reduction:
            result.cumulated_batch_size = torch.zeros_like(result.cumulated_batch_size)
