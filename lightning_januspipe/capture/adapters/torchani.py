"""Helps TorchANI's models through capture: neighbour lists without branches on padding and on the number of molecules.

TorchANI leaves pairs with padding out where a batch has padding (``if mask.any()``), and repeats pairs where there are
several molecules. A trace holds one branch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched_package


class TorchANIAdapter(Adapter):
    """Adapts models with neighbour lists of TorchANI 2.9."""

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which neighbour lists are made in one way for all batches."""
        return _in_one_way()


@contextmanager
def _in_one_way() -> Iterator[None]:
    from torchani import neighbors

    own_pairs, own_narrow = neighbors.all_pairs, neighbors.narrow_down

    def all_pairs(cutoff: float, species: Tensor, coords: Tensor, cell: Tensor | None = None, pbc: Any = None) -> Any:
        """Returns the neighbours of (B, N) atoms at ``coords`` (B, N, 3) in Å."""
        if pbc is not None:
            return own_pairs(cutoff, species, coords, cell, pbc)
        num_molecules, num_atoms = species.shape
        starts = num_atoms * torch.arange(num_molecules, device=species.device)
        pairs = torch.triu_indices(num_atoms, num_atoms, 1, device=species.device)
        return narrow_down(cutoff, species, coords, (pairs[:, None] + starts[:, None]).flatten(1))

    def narrow_down(
        cutoff: float, elem_idxs: Tensor, coords: Tensor, neighbor_idxs: Tensor, shifts: Tensor | None = None
    ) -> Any:
        """Returns the neighbours among (2, P) pairs of places, of atoms of all molecules; padding has element -1."""
        is_atom = (elem_idxs >= 0).reshape(-1)
        kept = (is_atom[neighbor_idxs[0]] & is_atom[neighbor_idxs[1]]).nonzero().flatten()
        if shifts is not None:
            shifts = shifts.index_select(0, kept)
        return own_narrow(cutoff, elem_idxs.clamp(min=0), coords, neighbor_idxs.index_select(1, kept), shifts)

    with ExitStack() as stack:
        for function in (all_pairs, narrow_down):
            stack.enter_context(patched_package(neighbors, function.__name__, function, "torchani 2.9"))
        yield
