"""Compares the batches of the ranks of a replica by a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_januspipe.distributed import waiting
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.mesh import Mesh


def fingerprint(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """Returns a few numbers that differ for different batches: sizes, and checksums weighted by place.

    Args:
        tensors: All tensors of a batch.
    """
    if not tensors:
        return (0.0,)
    checksums, magnitudes = [], []
    for index, tensor in enumerate(tensors, start=1):
        flat = tensor.detach().reshape(-1).to(torch.float64)
        # Neither periodic in the place of a value nor the same for two tensors: exchanged values are seen.
        places = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
        weights = torch.frac(places.mul_(0.6180339887498949)).add_(index)
        finite = torch.nan_to_num(flat, nan=0.5, posinf=2.0**64, neginf=-(2.0**64))  # a batch has to equal itself
        checksums.append(finite.dot(weights))
        magnitudes.append(finite.abs().dot(weights))
    total, magnitude = torch.stack([torch.stack(checksums).sum(), torch.stack(magnitudes).sum()]).tolist()
    return (float(len(tensors)), float(sum(t.numel() for t in tensors)), total, magnitude)


def same_batch(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether two fingerprints are of the same batch: sums of the same numbers may differ by rounding."""
    if len(first) < 4 or len(second) < 4:
        return list(first) == list(second)
    return first[:2] == second[:2] and all(
        abs(a - b) <= 1e-9 * max(first[3], second[3]) for a, b in zip(first[2:], second[2:], strict=True)
    )


def require_same_batches(inputs: Sequence[Sequence[Tensor]], batches: Sequence[Any], mesh: Mesh) -> None:
    """Compares the micro-batches of all ranks that work on one replica's samples: nothing else would notice.

    Args:
        inputs: The tensors that the potential gets of each micro-batch.
        batches: The micro-batches themselves, whose labels count too.
        mesh: This rank's process groups.

    Raises:
        PipelineError: The ranks hold different micro-batches, or one of them did not answer.
    """
    if len(mesh.replica_ranks) == 1:
        return
    labels = [[x for x in pytree.tree_leaves(b) if isinstance(x, Tensor)] for b in batches]
    mine = [fingerprint([*tensors, *more]) for tensors, more in zip(inputs, labels, strict=True)]
    found: list[Any] = [None] * len(mesh.replica_ranks)
    with waiting("comparison of the pipeline's batches", mesh.replica_group):
        dist.all_gather_object(found, mine, group=mesh.replica_group)
    for rank, other in zip(mesh.replica_ranks, found, strict=True):
        if len(other) != len(found[0]) or not all(map(same_batch, found[0], other)):
            differing = (i for i, (a, b) in enumerate(zip(found[0], other, strict=False)) if not same_batch(a, b))
            index = next(differing, 0)
            raise PipelineError(
                f"global ranks {mesh.replica_ranks[0]} and {rank} of one pipeline got different batches (micro-batch "
                f"{index}: {found[0][index : index + 1]} and {other[index : index + 1]}, as number of tensors, "
                f"numbers, checksum; {len(found[0])} and {len(other)} micro-batches). All ranks of a pipeline have to "
                "see the same samples: keep Trainer(use_distributed_sampler=True), or seed your sampler "
                "and your random transforms alike on every rank (lightning.seed_everything(..., workers=True))."
            )
