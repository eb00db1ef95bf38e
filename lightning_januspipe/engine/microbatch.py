"""Micro-batches: the samples of a batch in groups of equal cost, each collated by the project's own function.

No batch format has to be known. The gradient is that of gradient accumulation over the same groups: each weighs
1 / (number of groups), whatever its size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory as pin

from lightning_januspipe.engine.packing import pack, work

_MAX_DEPTH = 5

EDGES = ("edge_index", "idx_i", "edge_src", "senders", "nbr_list", "neighbor_list")
"""In the names under which samples keep their edges: two rows or columns of E indices, or one."""

ATOMS = ("pos", "positions", "coords", "coordinates", "cart_coords", "r", "xyz")
"""Names under which samples keep their atoms' positions, without underscores around them: N rows."""


@dataclass
class MicroBatches:
    """A batch as a loader gives it to the strategy.

    Attributes:
        batches: one collated batch for each micro-batch.
        num_samples: how many samples each holds; 0 where that is not known.
        examples: two collated batches for capture, of samples of this batch; the loader takes them away.
        ahead: what the loader's process found out about each micro-batch beside collating it, None where nothing.
    """

    batches: list[Any]
    num_samples: list[int]
    examples: tuple[Any, Any] | None = None
    ahead: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def pin_memory(self) -> MicroBatches:
        """Called by a loader's pinning thread."""
        return replace(self, batches=[pin(b) for b in self.batches])


class GroupedIndices(list[int]):
    """What a batch sampler gives that has formed the micro-batches itself: indices, one micro-batch after another.

    Args:
        groups: the indices of each micro-batch.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__(i for group in groups for i in group)
        self.sizes = [len(group) for group in groups]

    def __reduce__(self) -> tuple[Any, ...]:
        """As groups: workers get a copy."""
        ends = list(accumulate(self.sizes))
        return GroupedIndices, ([self[e - n : e] for e, n in zip(ends, self.sizes, strict=True)],)


class GroupedSamples(list[Any]):
    """The samples of :class:`GroupedIndices`.

    Args:
        samples: one micro-batch after another.
        sizes: samples of each micro-batch.
    """

    def __init__(self, samples: Sequence[Any], sizes: Sequence[int]) -> None:
        super().__init__(samples)
        ends = accumulate(sizes)
        self.groups = [list(samples[e - n : e]) for e, n in zip(ends, sizes, strict=True)]


class MicroBatchCollate:
    """Wraps a loader's ``collate_fn``.

    Args:
        collate: the loader's own function, from a list of samples to a batch.
        num_microbatches: into how many groups the samples of a batch go; fewer where there are fewer samples.
        required: whether a batch that cannot be split is an error, or one micro-batch.
        num_typical: samples of a usual micro-batch, if the first batch in each process shall carry examples.
        ahead: called with the place of each micro-batch and the collated micro-batch, in the process that collates.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        num_microbatches: int,
        *,
        required: bool = True,
        num_typical: int | None = None,
        ahead: Callable[[int, Any], Tensor | None] | None = None,
    ) -> None:
        self.collate, self._ahead = collate, ahead
        self.num_microbatches = num_microbatches
        self._required = required
        self._num_typical = num_typical

    def __call__(self, samples: Any) -> MicroBatches:
        """Split and collate.

        Raises:
            ValueError: there are no samples, or they are a batch already.
        """
        if not isinstance(samples, Sequence):
            return self._whole(samples)
        if isinstance(samples, GroupedSamples):
            groups = samples.groups
        else:
            groups = split_samples(samples, self.num_microbatches)
        examples: list[list[Any]] = []
        if self._num_typical:  # of copies: collating may change what it collates
            examples = [[_copied(s) for s in group] for group in example_groups(samples, self._num_typical)]
        found = MicroBatches([self.collate(g) for g in groups], [len(g) for g in groups])
        if examples:
            found.examples = self.collate(examples[0]), self.collate(examples[1])
            self._num_typical = None
        if self._ahead is not None:
            found.ahead = [self._ahead(i, batch) for i, batch in enumerate(found.batches)]
        return found

    def _whole(self, batch: Any) -> MicroBatches:
        what = (
            f"the dataset's __getitems__ gives a {type(batch).__name__}, not a list of samples, so that a batch cannot "
            f"be split into {self.num_microbatches} micro-batches"
        )
        how = "Let __getitems__ return a list of samples, which collate_fn joins"
        if self._required:
            raise ValueError(f"{what}. {how}, or use num_microbatches=1 with accumulate_grad_batches.")
        warnings.warn(f"{what}: each batch is one micro-batch. {how}.", stacklevel=2)
        return MicroBatches([self.collate(batch)], [0])


def split_samples(samples: Sequence[Any], num_groups: int) -> list[list[Any]]:
    """Samples in ``min(num_groups, len(samples))`` groups of nearly equal cost.

    See :func:`~lightning_januspipe.engine.packing.pack`; inside a group the order of the batch is kept.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a batch without samples cannot be split; check the batch sampler, which gave an empty batch")
    num_groups = min(num_groups, len(samples))
    if num_groups == 1:
        return [list(samples)]
    groups = pack([sample_cost(s) for s in samples], num_groups)
    ordered = sorted(groups, key=lambda g: g[0])
    return [[samples[i] for i in g] for g in ordered]


MAX_EXAMPLE = 20_000.0
"""Largest cost of a sample that is captured where training divides samples over several ranks."""


def example_groups(samples: Sequence[Any], num_typical: int, limited: bool = False) -> tuple[list[Any], list[Any]]:
    """Samples of two batches for capture, of different numbers of samples: one to trace, one to validate and profile.

    Args:
        samples: at least one; those of a group are repeated where there are too few.
        num_typical: samples of a usual micro-batch.
        limited: take samples for both that one process can hold, where training divides them over several.

    Returns:
        The largest two or three samples, and ``num_typical`` samples of middle sizes; where these are limited, of those
        that cost no more than :data:`MAX_EXAMPLE`, or else of the smallest two.
    """
    ordered = sorted(samples, key=sample_cost)
    num_traced = 3 if num_typical == 2 else 2
    if limited:
        ordered = [s for s in ordered if sample_cost(s) <= MAX_EXAMPLE] or ordered[:2]
    middle = [ordered[len(ordered) * (2 * i + 1) // (2 * num_typical)] for i in range(num_typical)]
    return [ordered[-1 - i % len(ordered)] for i in range(num_traced)], middle


def sample_cost(sample: Any) -> float:
    """How much work a sample is, about: edges and atoms (see :func:`~lightning_januspipe.engine.packing.work`).

    Where only one of these is found, that; without both, the numbers that the sample holds.

    Args:
        sample: a dict, a tuple, PyG data, an ``ase.Atoms``, or any object with attributes, also nested.
    """
    edges, atoms, numbers = _counts("", sample, 0)
    found = work(atoms, edges)
    return float(max(numbers if found is None else found, 1))


def _counts(name: str, value: Any, depth: int) -> tuple[int | None, int | None, int]:
    """Edges and atoms, where there are any by name, and all numbers."""
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        shape = tuple(value.shape)
        numbers = value.numel() if isinstance(value, Tensor) else int(value.size)
        if any(n in name for n in EDGES):
            return numbers // 2 if len(shape) == 2 else numbers, None, numbers
        if name.strip("_").lower() in ATOMS and len(shape) == 2:
            return None, shape[0], numbers
        return None, None, numbers
    if depth > _MAX_DEPTH or value is None or isinstance(value, (str, bytes, int, float)):
        return None, None, 0
    found = [_counts(n, v, depth + 1) for n, v in _parts(value)]
    edges = [e for e, _, _ in found if e is not None]
    atoms = [a for _, a, _ in found if a is not None]
    return sum(edges) if edges else None, max(atoms) if atoms else None, sum(n for _, _, n in found)


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a sample or batch of any form, with the names under which they are found.

    Args:
        value: a tensor, a dict, a list or tuple, PyG data, or any object with attributes, also nested.
        name: the name of a value that is a tensor itself.
        depth: how deep it lies.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif depth <= _MAX_DEPTH and value is not None and not isinstance(value, (str, bytes, int, float)):
        for inner, part in _parts(value):
            yield from named_tensors(part, inner, depth + 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [("", v) for v in value]
    named: Any = value
    if isinstance(value, tuple):
        named = named._asdict()
    if not isinstance(value, type) and hasattr(value, "to_dict"):  # PyG data
        with suppress(Exception):  # another method of this name
            named = value.to_dict()
    if not isinstance(named, Mapping):
        named = getattr(value, "__dict__", {})
    return [(str(k), v) for k, v in named.items()]


def _copied(sample: Any) -> Any:
    try:
        return copy.copy(sample)
    except Exception:  # what cannot be copied is collated as it is
        return sample


def fingerprint(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """A few numbers that differ for different batches: sizes, and a position-weighted checksum of all values."""
    if not tensors:
        return (0.0,)
    checksums, magnitudes = [], []
    for position, tensor in enumerate(tensors, start=1):
        flat = tensor.detach().reshape(-1).to(torch.float64)
        # Neither periodic in the place of a value nor the same for two tensors: exchanged values are seen.
        places = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
        weights = torch.frac(places.mul_(0.6180339887498949)).add_(position)
        finite = torch.nan_to_num(flat, nan=0.5, posinf=2.0**64, neginf=-(2.0**64))  # a batch has to equal itself
        checksums.append(finite.dot(weights))
        magnitudes.append(finite.abs().dot(weights))
    total, magnitude = torch.stack([torch.stack(checksums).sum(), torch.stack(magnitudes).sum()]).tolist()
    return (float(len(tensors)), float(sum(t.numel() for t in tensors)), total, magnitude)


def same_batch(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same batch: sums of the same numbers may differ by rounding."""
    if len(first) < 4 or len(second) < 4:
        return list(first) == list(second)
    return first[:2] == second[:2] and all(
        abs(a - b) <= 1e-9 * max(first[3], second[3]) for a, b in zip(first[2:], second[2:], strict=True)
    )
