"""Helps AIMNet2 through capture: packed batches tell by addresses which matrices of neighbours are the same.

Tensors have no addresses while they are traced.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched_package


class AIMNetAdapter(Adapter):
    """Adapts all models that prepare their batches with ``aimnet.nbops.calc_masks``."""

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which masks are made without addresses."""
        nbops = import_module("aimnet.nbops")
        make_masks = nbops.calc_masks

        def calc_masks(data: dict[str, Tensor]) -> dict[str, Tensor]:
            with _Identities():
                made: dict[str, Tensor] = make_masks(data)
            return made

        return patched_package(nbops, "calc_masks", calc_masks, "aimnet 0.2")


class _Identities(TorchFunctionMode):
    """Answers with the identity of a tensor where its address is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return id(args[0]) if func is Tensor.data_ptr else func(*args, **(kwargs or {}))
