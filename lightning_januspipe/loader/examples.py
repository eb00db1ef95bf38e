"""Takes example batches for capture from a loader, without changing what training sees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from lightning_januspipe.loader.microbatch import MicroBatchCollate, example_groups
from lightning_januspipe.loader.sample_fields import sample_cost
from lightning_januspipe.loader.split import SplitLoader, collates_samples, empty, first_and_last, fresh_pass
from lightning_januspipe.random_state import kept_random_state

_NUM_SAMPLES = 12


def example_batches(loader: Any, num_microbatches: int, limited: bool = False) -> tuple[Any, Any]:
    """Returns two batches for capture, collated by the loader's own function: to trace, and to validate and profile.

    They hold different numbers of samples: the first at least two, the second about as many as a micro-batch. If the
    loader yields ready-made batches, they are its first two.

    What training sees does not change. A map-style dataset is read at up to 12 indices spread over it, in a worker
    process if the loader has workers; samplers and generators stay as they are. For an iterable dataset that
    :func:`split_batches` prepared, the samples are from its first batch, which training gets as well.

    Args:
        loader: The training or evaluation loader.
        num_microbatches: Number of micro-batches that its batches are split into.
        limited: Whether to take only samples of a map-style dataset that fit into one process.

    Raises:
        ValueError: The loader yields no samples, or can be read only once.
    """
    if isinstance(loader, SplitLoader) and loader.split_state.reads_ahead:
        return loader.split_state.examples_of(loader)
    with kept_random_state(getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)):
        if not isinstance(loader, DataLoader):
            return first_and_last(list(islice(fresh_pass(loader, "loader"), 2)))
        if isinstance(loader.dataset, IterableDataset):
            return _read_iterable(loader, num_microbatches)
        return _read_map(loader, num_microbatches, limited)


def read_sample_costs(loader: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns the (n,) costs of a dataset's samples; reads each once, with as many workers as the loader has."""
    which: dict[str, Any] = {"num_workers": loader.num_workers}
    if loader.num_workers:
        which |= {"multiprocessing_context": loader.multiprocessing_context, "worker_init_fn": loader.worker_init_fn}
    with kept_random_state(loader.dataset):
        reader: Any = DataLoader(loader.dataset, batch_size=64, collate_fn=_costs_of, **which)
        return np.asarray(list(chain.from_iterable(reader)), dtype=np.float64)


def _costs_of(samples: Sequence[Any]) -> list[float]:
    return [sample_cost(s) for s in samples]


@dataclasses.dataclass
class _ExampleCollate:
    """Collates samples to the two batches for capture; returns None for batches that are ready-made."""

    collate: Callable[[list[Any]], Any]
    num_typical: int
    limited: bool = False

    def __call__(self, samples: Any) -> tuple[Any, Any] | None:
        if not isinstance(samples, Sequence):
            return None
        traced, other = example_groups(samples, self.num_typical, self.limited)
        return self.collate(traced), self.collate(other)


def _read_map(loader: Any, num_microbatches: int, limited: bool) -> tuple[Any, Any]:
    dataset = loader.dataset
    if not collates_samples(loader):
        keys = _keys(loader, loader.sampler, 2)
        return first_and_last(list(_reader(loader, loader.collate_fn, batch_size=None, sampler=keys)))
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 2 * num_microbatches
    collate = _ExampleCollate(_collate_of(loader), max(1, round(batch_size / num_microbatches)), limited)
    num = len(dataset) if hasattr(dataset, "__len__") else _NUM_SAMPLES
    if not num:
        raise empty(dataset)
    few = min(num, _NUM_SAMPLES)
    keys = [i * num // few for i in range(few)]
    try:
        (found,) = _reader(loader, collate, batch_sampler=[keys])
    except Exception as error:  # its keys may differ from 0, 1, 2, …; the sampler knows them
        try:
            keys = list(chain.from_iterable(_keys(loader, loader.batch_sampler, _NUM_SAMPLES)))[:_NUM_SAMPLES]
            (found,) = _reader(loader, collate, batch_sampler=[keys])
        except Exception:
            found = _of_own_batches(loader, collate.collate, num_microbatches)
            if found is None:
                raise error from None
    return found or first_and_last(list(_reader(loader, collate.collate, batch_sampler=[keys[-2:], keys[:1]])))


def _of_own_batches(loader: Any, collate: Callable[[Any], Any], num_microbatches: int) -> tuple[Any, Any] | None:
    """Returns examples of samples that the loader's own sampler puts together: others may not fit into one batch.

    Returns:
        Two or three samples of the costliest of the first batches, and as many as a micro-batch has of the cheapest;
        None where that fails too.
    """
    with suppress(Exception):
        keys = [list(batch) for batch in _keys(loader, loader.batch_sampler, _NUM_SAMPLES) if batch]
        num_other = max(1, round(sum(map(len, keys)) / len(keys) / num_microbatches))
        num_traced = 3 if num_other == 2 else 2
        few = [batch[: max(num_traced, num_other)] for batch in keys]
        batches = sorted(_reader(loader, list, batch_sampler=few), key=lambda samples: sample_cost(samples[0]))
        largest, smallest = batches[-1], batches[0]
        traced = [largest[i % len(largest)] for i in range(num_traced)]
        other = [smallest[i % len(smallest)] for i in range(num_other)]
        return collate(traced), collate(other)
    return None


def _read_iterable(loader: Any, num_microbatches: int) -> tuple[Any, Any]:
    if not loader.num_workers:
        fresh_pass(loader.dataset, "dataset")
    if not collates_samples(loader):
        return first_and_last(list(islice(_reader(loader, loader.collate_fn, batch_size=None), 2)))
    num_typical = max(1, round((loader.batch_size or 1) / num_microbatches))
    reader = _reader(loader, _ExampleCollate(_collate_of(loader), num_typical), batch_size=_NUM_SAMPLES)
    for found in reader:
        return found
    raise empty(loader.dataset)


def _reader(loader: Any, collate: Callable[[Any], Any], **which: Any) -> Any:
    """Returns a loader of a few samples that reads the dataset where the user's loader does: here, or in a worker.

    Files that a dataset opens on first use must not be open in this process when workers are forked from it.
    """
    if loader.num_workers:
        which.update(
            num_workers=1,
            multiprocessing_context=loader.multiprocessing_context,
            worker_init_fn=loader.worker_init_fn,
            timeout=loader.timeout,
            prefetch_factor=1,
        )
    return DataLoader(loader.dataset, collate_fn=collate, **which)


def _collate_of(loader: Any) -> Callable[[list[Any]], Any]:
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, MicroBatchCollate) else collate


def _keys(loader: Any, sampler: Any, num: int) -> list[Any]:
    """Returns the first keys of a copy of a sampler, which may have a state; its dataset is not copied."""
    with suppress(Exception):
        sampler = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    return list(islice(iter(sampler), num))
