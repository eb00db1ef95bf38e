"""Micro-batches: the samples of a batch in groups of equal cost, each collated by the project's own function.

No batch format has to be known. The gradient is that of gradient accumulation over the same groups: each weighs
1 / (number of groups), whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory as pin


@dataclass
class MicroBatches:
    """A batch as a loader gives it to the strategy.

    Attributes:
        batches: one collated batch for each micro-batch.
        num_samples: how many samples each holds.
    """

    batches: list[Any]
    num_samples: list[int]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def pin_memory(self) -> MicroBatches:
        """Called by a loader's pinning thread."""
        return MicroBatches([pin(b) for b in self.batches], self.num_samples)


class MicroBatchCollate:
    """Wraps a loader's ``collate_fn``.

    Args:
        collate: the loader's own function, from a list of samples to a batch.
        num_microbatches: into how many groups the samples of a batch go; fewer where there are fewer samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], num_microbatches: int) -> None:
        self.collate = collate
        self.num_microbatches = num_microbatches

    def __call__(self, samples: list[Any]) -> MicroBatches:
        groups = split_samples(samples, self.num_microbatches)
        return MicroBatches([self.collate(g) for g in groups], [len(g) for g in groups])


def split_samples(samples: Sequence[Any], num_groups: int) -> list[list[Any]]:
    """Samples in ``min(num_groups, len(samples))`` groups of nearly equal cost.

    Largest first, each into the least loaded group; inside a group the order of the batch is kept.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a batch without samples cannot be split; check the batch sampler, which gave an empty batch")
    num_groups = min(num_groups, len(samples))
    costs = [sample_cost(s) for s in samples]
    loads = [0.0] * num_groups
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for index in sorted(range(len(samples)), key=lambda i: -costs[i]):
        lightest = min(range(num_groups), key=lambda g: (loads[g], len(groups[g])))
        groups[lightest].append(index)
        loads[lightest] += costs[index]
    ordered = sorted((sorted(g) for g in groups), key=lambda g: g[0])
    return [[samples[i] for i in g] for g in ordered]


def sample_cost(sample: Any) -> float:
    """How much work a sample is, about: the numbers it holds, which edges dominate where a sample has them."""
    return float(max(_count(sample, 0), 1))


def _count(value: Any, depth: int) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if hasattr(value, "__array_interface__"):
        return int(value.size)
    if depth > 4 or value is None or isinstance(value, (str, bytes, int, float)):
        return 0
    if isinstance(value, Mapping):
        return sum(_count(v, depth + 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_count(v, depth + 1) for v in value)
    if hasattr(value, "to_dict"):  # PyG data
        return _count(value.to_dict(), depth + 1)
    if hasattr(value, "__dict__"):
        return sum(_count(v, depth + 1) for v in vars(value).values())
    return 0


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
