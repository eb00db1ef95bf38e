"""Whether ranks got the same batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
