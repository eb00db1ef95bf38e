"""Loaders: split their batches into micro-batches, seed their workers, and take samples from them for capture."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_januspipe.loader.copies import AnyLoader, copied_loader
from lightning_januspipe.loader.microbatch import (
    GroupedIndices,
    GroupedSamples,
    MicroBatchCollate,
    MicroBatches,
)


def split_batches(
    loader: Any, num_microbatches: int, required: bool, ahead: Callable[[int, Any], Tensor | None] | None = None
) -> Any:
    """A loader that gives :class:`~lightning_januspipe.loader.microbatch.MicroBatches`.

    The user's loader is not changed: it may serve for validation too. Only its ``state_dict``, where it has one, tells
    from now on how far the returned loader is.

    Args:
        loader: the user's loader.
        num_microbatches: into how many.
        required: whether the user asked for this number, so that a loader that cannot be split is an error.
        ahead: what to find out about each micro-batch where it is collated; see
            :class:`~lightning_januspipe.loader.microbatch.MicroBatchCollate`.

    Returns:
        A copy that splits. The loader itself where one micro-batch is wanted or it cannot be split; but a copy that
        gives the same batches if its dataset is iterable and there are several processes: its first batch is then read
        ahead for :func:`example_batches`, by every process alike.

    Raises:
        ValueError: the loader collates nothing, so that its batches cannot be split.
    """
    reads_ahead = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    if num_microbatches > 1 and not collates_samples(loader):
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
    """Refuse a training loader without a batch.

    Raises:
        ValueError: The dataset is empty, or fewer samples than a batch are left of it with ``drop_last``.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        return
    name = type(dataset).__name__
    if not len(dataset):
        raise ValueError(f"the training dataset ({name}) is empty; check its file, its split sizes and its filters")
    if isinstance(loader, DataLoader) and getattr(loader.batch_sampler, "drop_last", False) and not len(loader):
        size, num = getattr(loader.batch_sampler, "batch_size", None), getattr(loader.sampler, "num_replicas", 1)
        share = f" for {num} replicas" if num > 1 else ""
        raise ValueError(
            f"the training loader has no batch: its dataset ({name}) has {len(dataset)} samples{share}, a batch has "
            f"{size}, and drop_last leaves incomplete ones out. Use a smaller batch_size or drop_last=False"
        )


def seed_workers(loader: Any, worker_init: Callable[..., None], data_rank: int) -> None:
    """Seed workers by the data-parallel rank, so that the ranks of one pipeline see the same random transforms."""
    if isinstance(loader, DataLoader) and loader.worker_init_fn is None and os.environ.get("PL_SEED_WORKERS") == "1":
        loader.worker_init_fn = partial(worker_init, rank=data_rank)


def collates_microbatches(loader: Any) -> bool:
    """Whether a loader is one of :func:`split_batches` that splits what its collating function gets."""
    return isinstance(getattr(loader, "collate_fn", None), MicroBatchCollate)


def take_groups(loader: Any, batch_sampler: Any) -> None:
    """Let a loader of :func:`split_batches` take its batches from another sampler, and the micro-batches with them.

    Args:
        loader: the copy, which is changed. Its dataset stays what callbacks see.
        batch_sampler: gives :class:`~lightning_januspipe.loader.microbatch.GroupedIndices`.
    """
    loader.__dict__["batch_sampler"] = batch_sampler  # not to be set after __init__, where it is checked
    if collates_microbatches(loader):
        loader.split_state.has_groups = True


# -- splitting -------------------------------------------------------------------------------------------------------


def collates_samples(loader: Any) -> bool:
    """Whether a loader makes batches of samples, so that a batch can be split by collating fewer of them."""
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
        has_groups: whether the batch sampler forms the micro-batches.
    """

    num_microbatches: int
    collates: bool
    reads_ahead: bool
    examples: tuple[Any, Any] | None = None
    parked: Iterator[Any] | None = None
    has_groups: bool = False

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


class GroupedDataset:
    """A dataset as a loader's fetcher sees it: the samples of grouped indices come in the same groups.

    Everything else is asked of the dataset, and set there: a ``worker_init_fn`` finds this object in its worker.
    """

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
        return GroupedDataset, (self._dataset,)


class SplitLoader(AnyLoader):
    """Comes before the class of the user's loader in that of its copy."""

    split_state: _SplitState

    def __iter__(self) -> Any:
        state = self.split_state
        parked, state.parked = state.parked, None
        return parked or _SplitIterator(self._batches(), state, type(self).__name__)

    def _batches(self) -> Iterator[Any]:
        if not self.split_state.has_groups:
            return super().__iter__()
        # The dataset of the loader itself stays the user's, for callbacks; the one that is read groups its samples.
        reader = object.__new__(type(self))
        reader.__dict__.update(self.__dict__, dataset=GroupedDataset(self.dataset))
        batches = super(SplitLoader, reader).__iter__()
        self._iterator = reader._iterator  # of workers that persist
        return batches


class _SplitIterator(Iterator[Any]):
    """One pass over a split loader."""

    def __init__(self, batches: Iterator[Any], state: _SplitState, name: str) -> None:
        self._batches, self._state, self._name = batches, state, name
        self._ahead: deque[Any] = deque()
        if state.reads_ahead and state.examples is None:
            # Every process does so, at the same place in its random numbers, and before capture needs it on one.
            self._ahead.extend(islice(self._checked(), 1 if state.collates else 2))
            if self._ahead and not state.collates:
                state.examples = first_and_last(list(self._ahead))

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
    source = before if isinstance(before, SplitLoader) else loader
    split = copied_loader(SplitLoader, type(loader), source)
    if source is loader:
        split.__dict__["_iterator"] = None  # workers that persist belong to the user's loader
    else:
        split.__dict__.pop("state_dict", None)
    collates = collates_samples(loader)
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


def fresh_pass(iterable: Any, what: str) -> Iterator[Any]:
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


def first_and_last(batches: Sequence[Any]) -> tuple[Any, Any]:
    """Returns the first and the last of some batches.

    Raises:
        ValueError: There are none.
    """
    if not batches:
        raise ValueError("the loader gives no batches")
    return batches[0], batches[-1]
