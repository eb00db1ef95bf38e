"""Adapts Lightning's precision plugins to a mesh: clips gradients by the norm over all stages, and shares overflows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from lightning_januspipe.distributed import waiting
from lightning_januspipe.strategy.gradient_norm import clip_gradients_by_norm

if TYPE_CHECKING:
    from lightning.pytorch.plugins import Precision

    _Plugin = TypeVar("_Plugin", bound=Precision)

SUPPORTED = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


class MeshClipping:
    """Clips gradients for a precision plugin: norms count every parameter once, and a rank may have no gradients.

    Args:
        plugin: The plugin whose methods for clipping are replaced. It stays the object that users and Lightning know.
        strategy: The strategy, which has the mesh and the runner once these are known.
    """

    def __init__(self, plugin: Precision, strategy: Any) -> None:
        self._plugin, self.strategy = plugin, strategy
        self._clip_by_norm, self._clip_by_value = plugin.clip_grad_by_norm, plugin.clip_grad_by_value
        vars(plugin).update(clip_grad_by_norm=self.clip_by_norm, clip_grad_by_value=self.clip_by_value)

    def clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clips gradients by the norm over all stages."""
        if self.strategy.runner is None or self.strategy.mesh is None:
            self._clip_by_norm(optimizer, clip_val)
        else:
            parameters = list(self._plugin.main_params(optimizer))
            clip_gradients_by_norm(parameters, clip_val, self.strategy.runner.parameters, self.strategy.mesh)

    def clip_by_value(self, optimizer: Any, clip_val: float) -> None:
        """Clips gradients by value, if this rank has any: torch's own function fails without."""
        if any(p.grad is not None for p in self._plugin.main_params(optimizer)):
            self._clip_by_value(optimizer, clip_val)


class MeshScaling:
    """Shares the overflows that a gradient scaler finds: a step that overflows on one rank is skipped on all.

    Args:
        scaler: The scaler whose methods that look for overflows are replaced. Its scale is the same on all ranks.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._unscale, self._check = scaler.unscale_, scaler._check_inf_per_device
        vars(scaler).update(unscale_=self.unscale, _check_inf_per_device=self.check)

    def unscale(self, optimizer: Any) -> None:
        """Divides this rank's gradients by the scale."""
        self._unscale(optimizer)
        self._reduce(optimizer)

    def check(self, optimizer: Any) -> dict[Any, Tensor]:
        """Looks for overflows; called for optimizers that divide by the scale themselves (fused ones)."""
        self._check(optimizer)
        return self._reduce(optimizer)

    def _reduce(self, optimizer: Any) -> dict[Any, Tensor]:
        """Returns whether any rank of the mesh overflowed; a rank without gradients has no entry of its own."""
        if not self._scaler.is_enabled() or not dist.is_initialized():
            return {}
        state = self._scaler._per_optimizer_states[id(optimizer)]
        assert self._scaler._scale is not None
        found = torch.zeros_like(self._scaler._scale)
        for value in state["found_inf_per_device"].values():
            found = torch.maximum(found, value.to(found.device))
        with waiting("search for overflows in gradients"):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        state["found_inf_per_device"] = {found.device: found}
        return {found.device: found}


def mesh_aware(plugin: _Plugin, strategy: Any) -> _Plugin:
    """Returns the same plugin, which from now on clips over the mesh of ``strategy`` and shares overflows."""
    clipping = getattr(plugin.clip_grad_by_norm, "__self__", None)
    if isinstance(clipping, MeshClipping):
        clipping.strategy = strategy
    else:
        MeshClipping(plugin, strategy)
    scaler = getattr(plugin, "scaler", None)
    if scaler is not None and not isinstance(getattr(scaler.unscale_, "__self__", None), MeshScaling):
        MeshScaling(scaler)
    return plugin


def loss_scale(plugin: Precision) -> float:
    """Returns the factor by which a plugin's gradient scaler multiplies losses; 1 without a scaler."""
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
