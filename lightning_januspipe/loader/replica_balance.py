"""Deals the samples of one step of all replicas out to micro-batches of equal work (graph-aware re-scheduling).

Each replica reads the indices of all replicas' batches, packs them, and takes its own micro-batches (JanusPipe, arXiv
2605.18404). No messages are needed in training, because samplers are deterministic: one process sends the costs of all
samples to the others at the start.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_januspipe.loader.examples import read_sample_costs
from lightning_januspipe.loader.microbatch import GroupedIndices
from lightning_januspipe.loader.packing import plan
from lightning_januspipe.loader.sample_sizes import sample_costs
from lightning_januspipe.loader.split import collates_microbatches, take_groups

Balance = Literal["auto", "microbatches", "replicas"]


class BalancedBatches:
    """Is a batch sampler that deals the batches of all replicas anew and yields this replica's part.

    Args:
        batches: This replica's own batch sampler.
        costs: (n,) costs of the dataset's samples, the same in all processes.
        num_replicas: Number of replicas, D.
        replica: Index of this replica.
        num_groups: Number of micro-batches in a batch, K.

    Attributes:
        sampler: The sampler, on which Lightning calls ``set_epoch``.
    """

    def __init__(
        self, batches: Any, costs: NDArray[np.float64], num_replicas: int, replica: int, num_groups: int
    ) -> None:
        self._batches, self._costs = batches, costs
        self._num_replicas, self._replica, self._num_groups = num_replicas, replica, num_groups
        self.sampler = getattr(batches, "sampler", batches)
        self.batch_size = getattr(batches, "batch_size", None)
        self.drop_last = getattr(batches, "drop_last", False)

    def __len__(self) -> int:
        """Returns the number of batches in a pass."""
        return len(self._batches)

    def __iter__(self) -> Iterator[GroupedIndices]:
        """Yields the batches of one pass, in the epoch that the sampler is set to."""
        replicas = [_of_replica(self._batches, r) for r in range(self._num_replicas)]
        for parts in zip(*replicas, strict=True):
            yield GroupedIndices(self.groups([i for part in parts for i in part]))

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Returns this replica's micro-batches.

        Args:
            indices: Indices of all samples of one step.
        """
        dealt = plan(self._costs[np.asarray(indices)].tolist(), self._num_replicas, self._num_groups)
        return [[indices[i] for i in group] for group in dealt[self._replica]]


@dataclass(frozen=True)
class _Known:
    """Holds the costs of all samples, or the reason why they are not known, as one process sends it to the others."""

    costs: NDArray[np.float64] | None
    why: str
    num_batches: int | None


def balance_replicas(
    loader: Any,
    num_microbatches: int,
    num_replicas: int,
    replica: int,
    *,
    required: bool,
    tell: Callable[[Any], Any],
    is_teller: bool,
    may_change: bool = True,
) -> str | None:
    """Makes a loader deal the samples of a step over all replicas; all processes have to call it.

    Args:
        loader: A copy of the user's loader that splits its batches; it is changed.
        num_microbatches: Number of micro-batches of a batch, K.
        num_replicas: Number of replicas, D.
        replica: Index of this process's replica.
        required: Whether the user asked for it. If so, a dataset that does not know its samples' costs is read once.
        tell: Sends an object of the telling process to all processes, and returns it.
        is_teller: Whether this process is the telling one.
        may_change: Whether ``loader`` is a copy.

    Returns:
        None if the loader now deals samples over all replicas, else the reason why it cannot.

    Raises:
        ValueError: The loaders of the replicas differ.
    """
    why = _obstacle(loader, num_microbatches, num_replicas) if may_change else "it keeps a state of its own"
    known = tell(_look(loader, why, required) if is_teller else None)
    assert isinstance(known, _Known)
    if known.costs is None:
        return known.why
    if why or len(loader.dataset) != len(known.costs) or len(loader.batch_sampler) != known.num_batches:
        raise ValueError(
            f"the training loaders of the replicas differ: {why or 'they have different numbers of samples'}. Make "
            "them alike on all ranks, or use balance='microbatches'."
        )
    sampler = BalancedBatches(loader.batch_sampler, known.costs, num_replicas, replica, num_microbatches)
    take_groups(loader, sampler)
    return None


def _look(loader: Any, why: str, required: bool) -> _Known:
    if why:
        return _Known(None, why, None)
    name = type(loader.dataset).__name__
    try:
        costs = sample_costs(loader.dataset)
        if costs is None and required:
            costs = read_sample_costs(loader)
    except Exception as error:  # the other processes wait for an answer
        found = f"reading the costs of its samples failed ({type(error).__name__}: {error})"
        if not required:
            warnings.warn(f"samples are not balanced across replicas: {found}", stacklevel=4)
        return _Known(None, found, None)
    if costs is None:
        return _Known(None, f"its dataset ({name}) does not know the costs of its samples", None)
    if not np.isfinite(costs).all() or (costs < 0).any():
        return _Known(None, f"its dataset ({name}) gives costs that are not numbers >= 0", None)
    return _Known(costs, "", len(loader.batch_sampler))


def _obstacle(loader: Any, num_microbatches: int, num_replicas: int) -> str:
    """Returns the reason why a loader's batches cannot be dealt anew; empty if they can."""
    if not isinstance(loader, DataLoader):
        return f"it is not a torch DataLoader ({type(loader).__name__})"
    if isinstance(loader.dataset, IterableDataset):
        return f"its dataset ({type(loader.dataset).__name__}) is iterable"
    if loader.batch_sampler is None:
        return "it has no batch sampler"
    if num_microbatches > 1 and not collates_microbatches(loader):
        return "its batches cannot be split"
    sharing = _sharing_part(loader.batch_sampler)
    if sharing is None:
        return (
            "its sampler does not say how replicas share the samples, as a DistributedSampler does, or a batch sampler "
            "with the attributes num_replicas and rank"
        )
    if sharing.num_replicas != num_replicas:
        return f"its sampler shares the samples among {sharing.num_replicas} replicas, but there are {num_replicas}"
    return ""


def _sharing_part(batches: Any) -> Any:
    """Returns the object that shares samples among replicas and can be copied: batch sampler, sampler, or None."""
    if isinstance(getattr(batches, "num_replicas", None), int) and isinstance(getattr(batches, "rank", None), int):
        return batches
    sampler = getattr(batches, "sampler", None)
    # Lightning's wrapper around a custom sampler draws an order that may differ between processes.
    is_wrapper = hasattr(getattr(sampler, "dataset", None), "reset")
    if type(batches) is BatchSampler and isinstance(sampler, DistributedSampler) and not is_wrapper:
        return sampler
    return None


def _of_replica(batches: Any, replica: int) -> Any:
    """Returns a copy of a batch sampler for another replica."""
    other = copy.copy(batches)
    if _sharing_part(batches) is batches:
        other.rank = replica
    else:
        other.sampler = copy.copy(batches.sampler)
        other.sampler.rank = replica
    return other
