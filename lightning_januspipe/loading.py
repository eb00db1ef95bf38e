"""Loaders: split their batches into micro-batches, seed their workers, and take samples from them for capture."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_januspipe.engine.microbatch import (
    GroupedIndices,
    GroupedSamples,
    MicroBatchCollate,
    MicroBatches,
    example_groups,
    sample_cost,
)

_NUM_SAMPLES = 12


def split_batches(
    loader: Any, num_microbatches: int, required: bool, ahead: Callable[[int, Any], Tensor | None] | None = None
) -> Any:
    """A loader that gives :class:`~lightning_januspipe.engine.microbatch.MicroBatches`.

    The user's loader is not changed: it may serve for validation too. Only its ``state_dict``, where it has one, tells
    from now on how far the returned loader is.

    Args:
        loader: the user's loader.
        num_microbatches: into how many.
        required: whether the user asked for this number, so that a loader that cannot be split is an error.
        ahead: what to find out about each micro-batch where it is collated; see
            :class:`~lightning_januspipe.engine.microbatch.MicroBatchCollate`.

    Returns:
        A copy that splits. The loader itself where one micro-batch is wanted or it cannot be split; but a copy that
        gives the same batches if its dataset is iterable and there are several processes: its first batch is then read
        ahead for :func:`example_batches`, by every process alike.

    Raises:
        ValueError: the loader collates nothing, so that its batches cannot be split.
    """
    reads_ahead = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    if num_microbatches > 1 and not _collates(loader):
        _cannot_split(loader, num_microbatches, required, "gives ready-made batches without collating samples")
        num_microbatches = 1
    if num_microbatches == 1 and not (reads_ahead and _is_distributed()):
        return loader
    split = _split_copy(loader, num_microbatches, required, reads_ahead, ahead)
    if split is None:
        _cannot_split(loader, num_microbatches, required, "has a collate_fn that cannot be replaced")
        return loader
    return split


def require_samples(loader: Any) -> None:
    """Refuse a training loader without samples.

    Raises:
        ValueError: it has none.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ValueError(
            f"the training dataset ({type(dataset).__name__}) is empty; check its file, its split sizes and its filters"
        )


def seed_workers(loader: Any, worker_init: Callable[..., None], data_rank: int) -> None:
    """Seed workers by the data-parallel rank, so that the ranks of one pipeline see the same random transforms."""
    if isinstance(loader, DataLoader) and loader.worker_init_fn is None and os.environ.get("PL_SEED_WORKERS") == "1":
        loader.worker_init_fn = partial(worker_init, rank=data_rank)


def example_batches(loader: Any, num_microbatches: int, limited: bool = False) -> tuple[Any, Any]:
    """Two batches for capture, collated by the loader's own function: one to trace, one to validate and profile on.

    They hold different numbers of samples; the first has at least two, the second about as many as a micro-batch. Of
    ready-made batches they are the first two.

    What training sees is not changed. A map-style dataset is read at a few indices spread over it, at most 12 times,
    in a worker process if the loader has workers; neither sampler nor generator is touched. For an iterable dataset
    that :func:`split_batches` has seen, the samples are those of its first batch, which training gets all the same.

    Args:
        loader: the training (or evaluation) loader.
        num_microbatches: into how many its batches are split.
        limited: of a map-style dataset, take samples that one process can hold.

    Raises:
        ValueError: the loader gives no samples, or gives them only once.
    """
    if isinstance(loader, _SplitLoader) and loader.split_state.reads_ahead:
        return loader.split_state.examples_of(loader)
    with _same_random_numbers([getattr(loader, name, None) for name in ("dataset", "collate_fn")]):
        if not isinstance(loader, DataLoader):
            return _ends(list(islice(_fresh(loader, "loader"), 2)))
        if isinstance(loader.dataset, IterableDataset):
            return _read_iterable(loader, num_microbatches)
        return _read_map(loader, num_microbatches, limited)


def collates_microbatches(loader: Any) -> bool:
    """Whether a loader is one of :func:`split_batches` that splits what its collating function gets."""
    return isinstance(getattr(loader, "collate_fn", None), MicroBatchCollate)


def take_groups(loader: Any, batch_sampler: Any) -> None:
    """Let a loader of :func:`split_batches` take its batches from another sampler, and the micro-batches with them.

    Args:
        loader: the copy, which is changed. Its dataset is from now on seen through an object that passes groups on.
        batch_sampler: gives :class:`~lightning_januspipe.engine.microbatch.GroupedIndices`.
    """
    loader.__dict__["batch_sampler"] = batch_sampler  # both are not to be set after __init__, where they are checked
    if collates_microbatches(loader):
        loader.__dict__["dataset"] = _GroupingDataset(loader.dataset)


def measured_costs(loader: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n,) costs of a dataset's samples, each read once, by as many workers as the loader has."""
    which: dict[str, Any] = {"num_workers": loader.num_workers}
    if loader.num_workers:
        which |= {"multiprocessing_context": loader.multiprocessing_context, "worker_init_fn": loader.worker_init_fn}
    with _same_random_numbers([loader.dataset]):
        reader: Any = DataLoader(loader.dataset, batch_size=64, collate_fn=_costs_of, **which)
        return np.asarray(list(chain.from_iterable(reader)), dtype=np.float64)


def _costs_of(samples: Sequence[Any]) -> list[float]:
    return [sample_cost(s) for s in samples]


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


# -- splitting -------------------------------------------------------------------------------------------------------


def _collates(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and (loader.batch_sampler is not None or loader.batch_size is not None)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _cannot_split(loader: Any, num_microbatches: int, required: bool, why: str) -> None:
    what = f"the training loader ({type(loader).__name__}) {why}"
    how = "Use a torch DataLoader with a batch_size or batch_sampler"
    if required:
        raise ValueError(
            f"num_microbatches={num_microbatches}, but {what}, so its batches cannot be split. {how}, or "
            "num_microbatches=1 with accumulate_grad_batches."
        )
    if not _is_distributed() or dist.get_rank() == 0:
        warnings.warn(
            f"{what}: each batch is one micro-batch, on which the ranks of a pipeline work one after another. {how}, "
            "to have batches split; num_microbatches=1 says that this is meant.",
            stacklevel=3,
        )


@dataclasses.dataclass
class _SplitState:
    """What a split loader knows beside what the user's loader does.

    Attributes:
        num_microbatches: into how many its batches are split; its batches are plain if 1.
        collates: whether the collating function is wrapped.
        reads_ahead: whether the first batch is read as soon as there is an iterator.
        examples: two batches for capture.
        parked: an iterator made for these; the next that is asked for.
    """

    num_microbatches: int
    collates: bool
    reads_ahead: bool
    examples: tuple[Any, Any] | None = None
    parked: Iterator[Any] | None = None

    def examples_of(self, loader: Any) -> tuple[Any, Any]:
        """The examples of a loader that reads ahead."""
        if self.examples is None:
            self.parked = iter(loader)
        if self.examples is None:
            raise ValueError("the dataset gives no samples")
        return self.examples

    def checked(self, batch: Any, name: str) -> Any:
        """A batch as training gets it.

        Raises:
            ValueError: it was not made by the loader's collating function.
        """
        if not self.collates:
            return batch
        if not isinstance(batch, MicroBatches):
            raise ValueError(
                f"the training loader ({name}) makes batches (here: {type(batch).__name__}) otherwise than by its "
                "collate_fn, so they cannot be split. Use a torch DataLoader with a batch_size or batch_sampler, or "
                "num_microbatches=1 with accumulate_grad_batches."
            )
        if batch.examples is not None:
            self.examples, batch.examples = self.examples or batch.examples, None
        return batch if self.num_microbatches > 1 else batch.batches[0]


class _GroupingDataset:
    """A dataset as a loader's fetcher sees it: the samples of grouped indices come in the same groups."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        dataset = self._dataset
        many = getattr(dataset, "__getitems__", None)
        samples = many(indices) if many else [dataset[i] for i in indices]
        if isinstance(indices, GroupedIndices) and isinstance(samples, Sequence):
            return GroupedSamples(samples, indices.sizes)
        return samples

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _GroupingDataset, (self._dataset,)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """That of the dataset, for callbacks that ask."""
        return type(self._dataset)


class _SplitLoader:
    """Comes before the class of the user's loader in that of its copy."""

    split_state: _SplitState

    def __iter__(self) -> Iterator[Any]:
        state = self.split_state
        parked, state.parked = state.parked, None
        return parked or _SplitIterator(super().__iter__(), state, type(self).__name__)  # type: ignore[misc]


class _SplitIterator(Iterator[Any]):
    """One pass over a split loader."""

    def __init__(self, batches: Iterator[Any], state: _SplitState, name: str) -> None:
        self._batches, self._state, self._name = batches, state, name
        self._ahead: deque[Any] = deque()
        if state.reads_ahead and state.examples is None:
            # Every process does so, at the same place in its random numbers, and before capture needs it on one.
            self._ahead.extend(islice(self._checked(), 1 if state.collates else 2))
            if self._ahead and not state.collates:
                state.examples = _ends(list(self._ahead))

    def __next__(self) -> Any:
        return self._ahead.popleft() if self._ahead else self._state.checked(next(self._batches), self._name)

    def _checked(self) -> Iterator[Any]:
        return (self._state.checked(b, self._name) for b in self._batches)


def _split_copy(
    loader: Any,
    num_microbatches: int,
    required: bool,
    reads_ahead: bool,
    ahead: Callable[[int, Any], Tensor | None] | None,
) -> Any:
    """A copy made without ``__init__``, which in subclasses may ignore or rename its arguments; None if it cannot be.

    A loader with a state is represented by its copy: where it was copied before, it is the copy that went on.
    """
    before = getattr(loader.__dict__.get("state_dict"), "__self__", None)
    source = before if isinstance(before, _SplitLoader) else loader
    kind = type(loader)
    split_kind = types.new_class(kind.__name__, (_SplitLoader, kind))
    split_kind.__module__, split_kind.__qualname__ = kind.__module__, kind.__qualname__
    split: Any = object.__new__(split_kind)
    split.__dict__.update(source.__dict__)
    if source is loader:
        split.__dict__["_iterator"] = None  # workers that persist belong to the user's loader
    else:
        split.__dict__.pop("state_dict", None)
    collates = _collates(loader)
    split.split_state = _SplitState(num_microbatches, collates, reads_ahead)
    if collates:
        typical = max(1, round((loader.batch_size or 1) / num_microbatches)) if reads_ahead else None
        collate = MicroBatchCollate(
            loader.collate_fn,
            num_microbatches,
            required=required,
            num_typical=typical,
            ahead=ahead if num_microbatches > 1 else None,
        )
        with suppress(AttributeError):
            split.collate_fn = collate
        if split.collate_fn is not collate:
            return None
    if callable(getattr(split, "state_dict", None)):
        loader.__dict__["state_dict"] = split.state_dict
    return split


# -- examples --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _ExampleCollate:
    """Collates samples to the two batches for capture; None where a dataset gives ready-made batches."""

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
    if not _collates(loader):
        keys = _keys(loader, loader.sampler, 2)
        return _ends(list(_reader(loader, loader.collate_fn, batch_size=None, sampler=keys)))
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 2 * num_microbatches
    collate = _ExampleCollate(_collate_of(loader), max(1, round(batch_size / num_microbatches)), limited)
    num = len(dataset) if hasattr(dataset, "__len__") else _NUM_SAMPLES
    if not num:
        raise ValueError("the dataset gives no samples")
    few = min(num, _NUM_SAMPLES)
    keys = [i * num // few for i in range(few)]
    try:
        (found,) = _reader(loader, collate, batch_sampler=[keys])
    except Exception as error:  # its keys may be others than 0, 1, 2, …; the sampler knows them
        try:
            keys = list(chain.from_iterable(_keys(loader, loader.batch_sampler, _NUM_SAMPLES)))[:_NUM_SAMPLES]
            (found,) = _reader(loader, collate, batch_sampler=[keys])
        except Exception:
            raise error from None
    return found or _ends(list(_reader(loader, collate.collate, batch_sampler=[keys[-2:], keys[:1]])))


def _read_iterable(loader: Any, num_microbatches: int) -> tuple[Any, Any]:
    if not loader.num_workers:
        _fresh(loader.dataset, "dataset")
    if not _collates(loader):
        return _ends(list(islice(_reader(loader, loader.collate_fn, batch_size=None), 2)))
    num_typical = max(1, round((loader.batch_size or 1) / num_microbatches))
    reader = _reader(loader, _ExampleCollate(_collate_of(loader), num_typical), batch_size=_NUM_SAMPLES)
    for found in reader:
        return found
    raise ValueError("the dataset gives no samples")


def _reader(loader: Any, collate: Callable[[Any], Any], **which: Any) -> Any:
    """A loader of a few samples of the same dataset, read where the user's loader reads: here, or in a worker.

    What a dataset opens on first use must not be open in this process when workers are forked from it.
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
    """The first keys of a copy of a sampler, which may have a state; the dataset that it may know is not copied."""
    with suppress(Exception):
        sampler = copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    return list(islice(iter(sampler), num))


def _fresh(iterable: Any, what: str) -> Iterator[Any]:
    """A pass over an iterable of which training has a pass of its own.

    Raises:
        ValueError: there is only one, and this process would take what others still expect.
    """
    once = hasattr(type(iterable), "__next__") or (what == "dataset" and iter(iterable) is iter(iterable))
    if once and _is_distributed():
        raise ValueError(
            f"the {what} ({type(iterable).__name__}) can be read only once, so that capture would take samples away "
            "from what follows. Let its __iter__ start a new pass: open its file, or make its generator, in there."
        )
    return iter(iterable)


def _ends(batches: Sequence[Any]) -> tuple[Any, Any]:
    if not batches:
        raise ValueError("the loader gives no batches")
    return batches[0], batches[-1]


@contextmanager
def _same_random_numbers(dataset: Any = None) -> Iterator[None]:
    """Looking at samples must not change which ones training sees: also not by generators that a dataset holds."""
    restore = [_restorer(g) for g in _generators(dataset)]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for function in restore:
                function()


def _generators(value: Any) -> list[Any]:
    """Random number generators among the attributes of an object, and of what it holds, nearest first."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = deque([(value, 0)])
    while todo and len(seen) < 1000:
        item, depth = todo.popleft()
        parts: Iterable[Any] = ()
        if id(item) in seen or depth > 6:
            continue
        seen.add(id(item))
        if isinstance(item, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            parts = islice(item.values() if isinstance(item, Mapping) else item, 50)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, types.ModuleType, Tensor, nn.Module)):
            parts = vars(item).values()
        todo.extend((part, depth + 1) for part in parts)
    return found


def _restorer(generator: Any) -> Callable[[], None]:
    """A function that sets a generator back to where it is now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())
