"""Splits a batch into micro-batches of about equal cost, each collated by the loader's own function.

The batch format does not matter. The gradient is that of gradient accumulation over the same groups: each has the
weight 1 / (number of groups), whatever its size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory as pin

from lightning_januspipe.loader.packing import pack_samples
from lightning_januspipe.loader.sample_fields import sample_cost


@dataclass
class MicroBatches:
    """Holds the micro-batches of one batch.

    Attributes:
        batches: One collated batch for each micro-batch.
        num_samples: The number of samples in each micro-batch; 0 if it is not known.
        examples: Two collated batches for capture, made of samples of this batch; the loader removes them.
        owners: For each micro-batch the graph ranks that own its atoms; None if the loader's process chose none.
    """

    batches: list[Any]
    num_samples: list[int]
    examples: tuple[Any, Any] | None = None
    owners: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def pin_memory(self) -> MicroBatches:
        """Returns the same micro-batches in pinned memory; called by a loader's pinning thread."""
        return replace(self, batches=[pin(b) for b in self.batches])


class GroupedIndices(list[int]):
    """Holds the indices of a batch, micro-batch by micro-batch, from a batch sampler that forms the micro-batches.

    Args:
        groups: The indices of each micro-batch.

    Attributes:
        sizes: The number of samples in each micro-batch.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__(i for group in groups for i in group)
        self.sizes = [len(group) for group in groups]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as groups: workers get a copy."""
        ends = list(accumulate(self.sizes))
        return GroupedIndices, ([self[e - n : e] for e, n in zip(ends, self.sizes, strict=True)],)


class GroupedSamples(list[Any]):
    """Holds the samples of :class:`GroupedIndices`.

    Args:
        samples: The samples of the batch, micro-batch by micro-batch.
        sizes: The number of samples in each micro-batch.

    Attributes:
        groups: The samples of each micro-batch.
    """

    def __init__(self, samples: Sequence[Any], sizes: Sequence[int]) -> None:
        super().__init__(samples)
        ends = accumulate(sizes)
        self.groups = [list(samples[e - n : e]) for e, n in zip(ends, sizes, strict=True)]


class MicroBatchCollate:
    """Wraps a loader's ``collate_fn``, so that it returns micro-batches.

    Args:
        collate: The loader's own function, from a list of samples to a batch.
        num_microbatches: Number of micro-batches of a batch; a batch with fewer samples has fewer.
        required: Whether a batch that cannot be split is an error; otherwise it is one micro-batch.
        num_typical: Number of samples in a usual micro-batch. If it is given, the first batch in each process carries
            examples for capture.
        choose_owners: Returns the owners of a micro-batch's atoms, from its index and the collated batch; called where
            it is collated.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        num_microbatches: int,
        *,
        required: bool = True,
        num_typical: int | None = None,
        choose_owners: Callable[[int, Any], Tensor | None] | None = None,
    ) -> None:
        self.collate, self._choose_owners = collate, choose_owners
        self.num_microbatches = num_microbatches
        self._required = required
        self._num_typical = num_typical

    def __call__(self, samples: Any) -> MicroBatches:
        """Splits the samples of a batch and collates each micro-batch.

        Raises:
            ValueError: There are no samples, or they are a batch already.
        """
        if not isinstance(samples, Sequence):
            return self._whole(samples)
        if isinstance(samples, GroupedSamples):
            groups = samples.groups
        else:
            groups = split_samples(samples, self.num_microbatches)
        examples: list[list[Any]] = []
        if self._num_typical:  # copies, because collating may change samples
            examples = [[_copied(s) for s in group] for group in example_groups(samples, self._num_typical)]
        found = MicroBatches([self.collate(g) for g in groups], [len(g) for g in groups])
        if examples:
            found.examples = self.collate(examples[0]), self.collate(examples[1])
            self._num_typical = None
        if self._choose_owners is not None:
            found.owners = [self._choose_owners(i, batch) for i, batch in enumerate(found.batches)]
        return found

    def _whole(self, batch: Any) -> MicroBatches:
        what = (
            f"the dataset's __getitems__ returns a {type(batch).__name__}, not a list of samples, so a batch cannot be "
            f"split into {self.num_microbatches} micro-batches"
        )
        how = "Let __getitems__ return a list of samples, and join them in collate_fn"
        if self._required:
            raise ValueError(f"{what}. {how}, or use num_microbatches=1 with accumulate_grad_batches.")
        warnings.warn(f"{what}: each batch is one micro-batch. {how}.", stacklevel=2)
        return MicroBatches([self.collate(batch)], [0])


def split_samples(samples: Sequence[Any], num_groups: int) -> list[list[Any]]:
    """Returns ``min(num_groups, len(samples))`` groups of samples of nearly equal cost.

    See :func:`~lightning_januspipe.loader.packing.pack_samples`. Inside a group samples keep the order of the batch.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError(
            "a batch without samples cannot be split; check the batch sampler, which yields an empty batch"
        )
    num_groups = min(num_groups, len(samples))
    if num_groups == 1:
        return [list(samples)]
    groups = pack_samples([sample_cost(s) for s in samples], num_groups)
    ordered = sorted(groups, key=lambda g: g[0])
    return [[samples[i] for i in g] for g in ordered]


MAX_EXAMPLE = 20_000.0
"""The largest cost of a sample that one rank captures, where training shards samples over several ranks."""


def example_groups(samples: Sequence[Any], num_typical: int, limited: bool = False) -> tuple[list[Any], list[Any]]:
    """Returns the samples of two batches for capture: one to trace, one of another size to validate and profile.

    Args:
        samples: At least one sample; samples are repeated if there are too few.
        num_typical: Number of samples in a usual micro-batch.
        limited: Whether to choose among samples that fit into one process only: those that cost no more than
            :data:`MAX_EXAMPLE`, or the smallest two if all cost more.

    Returns:
        The largest two or three samples, and ``num_typical`` samples of middle sizes.
    """
    ordered = sorted(samples, key=sample_cost)
    num_traced = 3 if num_typical == 2 else 2
    if limited:
        ordered = [s for s in ordered if sample_cost(s) <= MAX_EXAMPLE] or ordered[:2]
    middle = [ordered[len(ordered) * (2 * i + 1) // (2 * num_typical)] for i in range(num_typical)]
    return [ordered[-1 - i % len(ordered)] for i in range(num_traced)], middle


def _copied(sample: Any) -> Any:
    try:
        return copy.copy(sample)
    except Exception:  # a sample that cannot be copied is collated as it is
        return sample
