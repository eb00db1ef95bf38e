"""Helps TorchANI's models through capture: pairs with padding are left out of every batch, without a branch.

TorchANI leaves them out where a batch has padding (``if mask.any()``), and a trace holds one branch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched_package


class TorchANIAdapter(Adapter):
    """Adapts models with neighbour lists of TorchANI 2.9."""

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which neighbour lists leave out padding for batches without padding too."""
        return _without_padding()


@contextmanager
def _without_padding() -> Iterator[None]:
    from torchani import neighbors

    own = neighbors.narrow_down

    def narrow_down(
        cutoff: float, elem_idxs: Tensor, coords: Tensor, neighbor_idxs: Tensor, shifts: Tensor | None = None
    ) -> Any:
        """Returns the neighbours among (2, P) pairs of places, of atoms of all molecules; padding has element -1."""
        is_atom = (elem_idxs >= 0).reshape(-1)
        kept = (is_atom[neighbor_idxs[0]] & is_atom[neighbor_idxs[1]]).nonzero().flatten()
        if shifts is not None:
            shifts = shifts.index_select(0, kept)
        return own(cutoff, elem_idxs.clamp(min=0), coords, neighbor_idxs.index_select(1, kept), shifts)

    with patched_package(neighbors, "narrow_down", narrow_down, "torchani 2.9"):
        yield
