"""Takes example batches for capture from a loader, without changing what training sees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
    except Exception:  # its keys may differ from 0, 1, 2, …; the sampler knows them
        batches = [list(batch) for batch in _keys(loader, loader.batch_sampler, _NUM_SAMPLES) if batch]
        keys = list(chain.from_iterable(batches))[:_NUM_SAMPLES]
        if not keys:
            raise
        try:
            (found,) = _reader(loader, collate, batch_sampler=[keys])
        except Exception:
            return _of_own_batches(loader, collate.collate, batches, num_microbatches)
    return found or first_and_last(list(_reader(loader, collate.collate, batch_sampler=[keys[-2:], keys[:1]])))


def _of_own_batches(
    loader: Any, collate: Callable[[Any], Any], batches: Sequence[list[Any]], num_microbatches: int
) -> tuple[Any, Any]:
    """Returns examples of samples that the loader's own sampler puts together: others may not fit into one batch.

    Args:
        loader: The loader.
        collate: Makes a batch of samples.
        batches: The keys of the first batches.
        num_microbatches: Number of micro-batches of a batch.

    Returns:
        Two or three samples of the costliest of the batches, and as many as a micro-batch has of the cheapest.
    """
    num_other = max(1, round(sum(map(len, batches)) / len(batches) / num_microbatches))
    num_traced = 3 if num_other == 2 else 2
    few = [batch[: max(num_traced, num_other)] for batch in batches]
    found = sorted(_reader(loader, list, batch_sampler=few), key=lambda samples: sample_cost(samples[0]))
    largest, smallest = found[-1], found[0]
    traced = [largest[i % len(largest)] for i in range(num_traced)]
    other = [smallest[i % len(smallest)] for i in range(num_other)]
    return collate(traced), collate(other)


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
    """Returns the first keys of a copy of a sampler, whose own state stays as it is.

    Raises:
        ValueError: The sampler holds an iterator, from which a copy would take keys away.
    """
    dataset = loader.dataset
    with kept_random_state(sampler):  # what cannot be copied is shared with the copy
        return list(islice(iter(_copied(sampler, {id(dataset): dataset})), num))


def _copied(item: Any, copies: dict[int, Any]) -> Any:
    """Returns a copy of an object; what in its attributes cannot be copied, such as a lock, is the same in both.

    Args:
        item: The object.
        copies: Copies by the identity of what they are of, as :func:`copy.deepcopy` keeps them.
    """
    if id(item) in copies:
        return copies[id(item)]
    try:
        return copy.deepcopy(item, dict(copies))
    except Exception as error:  # whatever the parts of a sampler raise
        if isinstance(item, Iterator):
            raise ValueError(
                f"the loader's sampler reads a {type(item).__name__}, which can be read only once and not be copied, "
                "so that examples for capture would be taken away from training. Let its __iter__ start a new pass."
            ) from error
        if not hasattr(item, "__dict__"):
            return item
        twin = copies[id(item)] = copy.copy(item)
        vars(twin).update({name: _copied(value, copies) for name, value in vars(item).items()})
        return twin
