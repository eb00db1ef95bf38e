"""Chooses the owners of atoms in the loader's worker processes, while training goes on.

The arguments of the potential are not known there, so edges and positions are found by their names. Every choice of
owners gives right results. A choice from other edges than the potential's costs more exchanged rows than necessary, and
a choice for another number of atoms is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.loader.sample_fields import EDGE_ENDS, EDGE_LISTS, POSITIONS, named_tensors


@dataclass(frozen=True)
class OwnersInLoader:
    """Chooses owners for every ``size``-th micro-batch of a batch, starting at ``rank``.

    Attributes:
        num_ranks: G, the number of graph ranks.
        rank: index of this rank among the ranks that hold the same micro-batches.
        size: number of the ranks that hold the same micro-batches.
    """

    num_ranks: int
    rank: int
    size: int

    def __call__(self, index: int, batch: Any) -> Tensor | None:
        """Returns the owners of the atoms of one micro-batch.

        Args:
            index: position of the micro-batch in the batch.
            batch: the collated micro-batch.

        Returns:
            (N,) ranks; None outside of worker processes, if it is another rank's turn, and if no edges were found.
        """
        if get_worker_info() is None or index % self.size != self.rank:
            return None
        return owners_by_name(batch, self.num_ranks)


def owners_by_name(batch: Any, num_ranks: int) -> Tensor | None:
    """Returns the owners of the atoms of a collated batch; None if its edges or positions do not have usual names.

    Args:
        batch: a dict, a tuple, PyG data, or any object with attributes, also nested.
        num_ranks: G, the number of graph ranks.
    """
    named = [(name.strip("_").lower(), t) for name, t in named_tensors(batch) if t.layout == torch.strided]
    named = [(name, t) for name, t in named if t.device.type == "cpu" and not t.is_nested]
    positions = next((t for n, t in named if n in POSITIONS and t.dim() == 2 and t.shape[1] == 3), None)
    edges = _edges(named)
    if positions is None or edges is None:
        return None
    target, source = edges
    num_atoms = len(positions)
    if (
        len(target)
        and not 0 <= int(min(target.min(), source.min())) <= int(max(target.max(), source.max())) < num_atoms
    ):
        return None  # indices of something else
    return partition_atoms(target, source, num_atoms, num_ranks, positions)


def _edges(named: list[tuple[str, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Returns targets and sources. Which row of two is which does not matter: lists of edges hold both directions."""
    integers = [(n, t.to(torch.int64)) for n, t in named if t.dtype in (torch.int64, torch.int32)]
    for _, tensor in ((n, t) for n, t in integers if any(e in n for e in EDGE_LISTS) and t.dim() == 2):
        if 2 in tensor.shape:
            first, second = (tensor if tensor.shape[0] == 2 else tensor.T).unbind(0)
            return second, first
    for ends in EDGE_ENDS:
        found = [next((t for n, t in integers if n == end and t.dim() == 1), None) for end in ends]
        if found[0] is not None and found[1] is not None and len(found[0]) == len(found[1]):
            return found[0], found[1]
    return None
