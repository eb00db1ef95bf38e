"""Splits the batches of a loader into micro-batches: a copy of the loader does it, with its collate_fn wrapped."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
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
    loader: Any, num_microbatches: int, required: bool, choose_owners: Callable[[int, Any], Tensor | None] | None = None
) -> Any:
    """Returns a loader that yields :class:`~lightning_januspipe.loader.microbatch.MicroBatches`.

    The user's loader is not changed, because it may serve for validation too. Only its ``state_dict``, if it has one,
    returns the state of the new loader from now on.

    Args:
        loader: The user's loader.
        num_microbatches: Number of micro-batches of a batch.
        required: Whether the user asked for this number, so that a loader that cannot be split is an error.
        choose_owners: Called with each micro-batch where it is collated; see
            :class:`~lightning_januspipe.loader.microbatch.MicroBatchCollate`.

    Returns:
        A copy that splits its batches. For one micro-batch, or if the batches cannot be split, it is the loader itself,
        but a copy that yields the same batches if its dataset is iterable and there are several processes: every
        process then reads its first batch ahead for :func:`~lightning_januspipe.loader.examples.example_batches`.

    Raises:
        ValueError: The loader does not collate samples, so that its batches cannot be split, but ``required`` is set.
    """
    reads_ahead = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    if num_microbatches > 1 and not collates_samples(loader):
        _cannot_split(loader, num_microbatches, required, "gives ready-made batches without collating samples")
        num_microbatches = 1
    if num_microbatches == 1 and not (reads_ahead and _is_distributed()):
        return loader
    split = _split_copy(loader, num_microbatches, required, reads_ahead, choose_owners)
    if split is None:
        _cannot_split(loader, num_microbatches, required, "has a collate_fn that cannot be replaced")
        return loader
    return split


def require_samples(loader: Any) -> None:
    """Raises an error if a training loader has no batch.

    Raises:
        ValueError: The dataset is empty, or fewer samples than a batch are left of it with ``drop_last``.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        return
    if not len(dataset):
        raise empty(dataset)
    if isinstance(loader, DataLoader) and getattr(loader.batch_sampler, "drop_last", False) and not len(loader):
        size, num = getattr(loader.batch_sampler, "batch_size", None), getattr(loader.sampler, "num_replicas", 1)
        share = f" for {num} replicas" if num > 1 else ""
        raise ValueError(
            f"the training loader has no batch: its dataset ({type(dataset).__name__}) has {len(dataset)} samples"
            f"{share}, a batch has {size}, and drop_last leaves incomplete ones out. Use a smaller batch_size or "
            "drop_last=False"
        )


def batch_size_of(loader: Any) -> int | None:
    """Returns the number of samples in a whole batch of a loader; None if it is not known, or not always the same."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def empty(dataset: Any) -> ValueError:
    """Returns the error for an empty dataset."""
    return ValueError(
        f"the dataset ({type(dataset).__name__}) is empty; check its file, its split sizes and its filters"
    )


def seed_workers(loader: Any, worker_init: Callable[..., None], data_rank: int) -> None:
    """Seeds workers by the replica, so that the ranks of one replica see the same random transforms."""
    if isinstance(loader, DataLoader) and loader.worker_init_fn is None and os.environ.get("PL_SEED_WORKERS") == "1":
        loader.worker_init_fn = partial(worker_init, rank=data_rank)


def collates_microbatches(loader: Any) -> bool:
    """Returns whether a loader splits its batches, as :func:`split_batches` made it."""
    return isinstance(getattr(loader, "collate_fn", None), MicroBatchCollate)


def take_groups(loader: Any, batch_sampler: Any) -> None:
    """Makes a loader of :func:`split_batches` take its batches, and the micro-batches in them, from a batch sampler.

    Args:
        loader: The copy, which is changed; callbacks still find the user's dataset in it.
        batch_sampler: Yields :class:`~lightning_januspipe.loader.microbatch.GroupedIndices`.
    """
    vars(loader)["batch_sampler"] = batch_sampler  # DataLoader forbids to set it after __init__
    if collates_microbatches(loader):
        loader.split_state.has_groups = True


# -- splitting -------------------------------------------------------------------------------------------------------


def collates_samples(loader: Any) -> bool:
    """Returns whether a loader collates samples, so that a batch can be split by collating fewer of them."""
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
            "so that batches are split, or set num_microbatches=1 to silence this warning.",
            stacklevel=3,
        )


@dataclasses.dataclass
class _SplitState:
    """Holds the state that a split loader has beside the user's loader.

    Attributes:
        num_microbatches: Number of micro-batches of a batch; with 1 the loader yields plain batches.
        collates: Whether the collating function is wrapped.
        reads_ahead: Whether the first batch is read as soon as an iterator is made.
        examples: Two batches for capture, once they are known.
        parked: An iterator that was made to get the examples, and is the next one that training gets.
        has_groups: Whether the batch sampler forms the micro-batches.
    """

    num_microbatches: int
    collates: bool
    reads_ahead: bool
    examples: tuple[Any, Any] | None = None
    parked: Iterator[Any] | None = None
    has_groups: bool = False

    def examples_of(self, loader: Any) -> tuple[Any, Any]:
        """Returns the two example batches of a loader that reads ahead."""
        if self.examples is None:
            self.parked = iter(loader)
        if self.examples is None:
            raise empty(loader.dataset)
        return self.examples

    def checked(self, batch: Any, name: str) -> Any:
        """Returns a batch as training gets it, and keeps the examples that it carries.

        Raises:
            ValueError: The loader's collating function did not make the batch.
        """
        if not self.collates:
            return batch
        if not isinstance(batch, MicroBatches):
            raise ValueError(
                f"the training loader ({name}) yields a {type(batch).__name__} that its collate_fn did not make, so "
                "batches cannot be split. Use a torch DataLoader with a batch_size or batch_sampler, or "
                "num_microbatches=1 with accumulate_grad_batches."
            )
        if batch.examples is not None:
            self.examples, batch.examples = self.examples or batch.examples, None
        return batch if self.num_microbatches > 1 else batch.batches[0]


class GroupedDataset:
    """Wraps a dataset for a loader's fetcher: the samples of grouped indices come in the same groups.

    Attributes are those of the dataset, also when they are set: a ``worker_init_fn`` gets this object in its worker.
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
    """Adds splitting to the class of the user's loader; see :func:`copied_loader`."""

    split_state: _SplitState

    def __iter__(self) -> Any:
        state = self.split_state
        parked, state.parked = state.parked, None
        return parked or _split_pass(self._batches(), state, type(self).__name__)

    def _batches(self) -> Iterator[Any]:
        if not self.split_state.has_groups:
            return super().__iter__()
        # Callbacks find the user's dataset in the loader; its iterators read another one, which groups the samples.
        reader = object.__new__(type(self))
        reader.__dict__.update(self.__dict__, dataset=GroupedDataset(self.dataset))
        batches = super(SplitLoader, reader).__iter__()
        self._iterator = reader._iterator  # persistent workers
        return batches


def _split_pass(batches: Iterator[Any], state: _SplitState, name: str) -> Iterator[Any]:
    """Returns one pass over a split loader."""
    checked = (state.checked(batch, name) for batch in batches)
    if not state.reads_ahead or state.examples is not None:
        return checked
    # Every process reads ahead here, although one captures, so that their random numbers stay the same.
    ahead = list(islice(checked, 1 if state.collates else 2))
    if ahead and not state.collates:
        state.examples = first_and_last(ahead)
    return chain(ahead, checked)


def _split_copy(
    loader: Any,
    num_microbatches: int,
    required: bool,
    reads_ahead: bool,
    choose_owners: Callable[[int, Any], Tensor | None] | None,
) -> Any:
    """Returns a copy of a loader that splits its batches; None if its ``collate_fn`` cannot be replaced.

    If a loader has a state and was copied before, the state is that of the copy, which went on.
    """
    before = getattr(loader.__dict__.get("state_dict"), "__self__", None)
    source = before if isinstance(before, SplitLoader) else loader
    split = copied_loader(SplitLoader, type(loader), source)
    if source is loader:
        split.__dict__["_iterator"] = None  # persistent workers belong to the user's loader
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
            choose_owners=choose_owners if num_microbatches > 1 else None,
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
    """Returns a new iterator for reading examples, while training iterates by itself.

    Raises:
        ValueError: The iterable can be read only once, and there are several processes.
    """
    once = hasattr(type(iterable), "__next__") or (what == "dataset" and iter(iterable) is iter(iterable))
    if once and _is_distributed():
        raise ValueError(
            f"the {what} ({type(iterable).__name__}) can be read only once, so reading examples for capture would take "
            "samples away. Let its __iter__ start a new pass: open its file, or make its generator, in there."
        )
    return iter(iterable)


def first_and_last(batches: Sequence[Any]) -> tuple[Any, Any]:
    """Returns the first and the last of some batches as the two example batches.

    Raises:
        ValueError: There are none.
    """
    if not batches:
        raise ValueError("the loader gives no batches")
    return batches[0], batches[-1]
