"""Any precision plugin of Lightning over a whole mesh: clipping by norm, and skipping a step that overflowed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.strategy.gradient_norm import clip_gradients_by_norm

SUPPORTED = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


class MeshClipping:
    """Mixin for a precision plugin: norms count every parameter of the pipeline once; a rank may have no gradients."""

    januspipe_strategy: Any

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip gradients by the norm over all stages."""
        strategy = self.januspipe_strategy
        if strategy.runner is None or strategy.mesh is None:
            super().clip_grad_by_norm(optimizer, clip_val)  # type: ignore[misc]
            return
        clip_gradients_by_norm(list(self.main_params(optimizer)), clip_val, strategy.runner, strategy.mesh)  # type: ignore[attr-defined]

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        """Clip gradients by value, where there are any: torch's own function fails without."""
        if any(p.grad is not None for p in self.main_params(optimizer)):  # type: ignore[attr-defined]
            super().clip_grad_by_value(optimizer, clip_val)  # type: ignore[misc]


class MeshScaling:
    """Mixin for a gradient scaler: a step that overflowed on one rank is skipped on all, and the scale stays one."""

    def unscale_(self, optimizer: Any) -> None:
        """Divide this rank's gradients by the scale."""
        super().unscale_(optimizer)  # type: ignore[misc]
        self._reduce(optimizer)

    def _check_inf_per_device(self, optimizer: Any) -> dict[Any, Tensor]:
        """Called for optimizers that unscale by themselves (fused ones)."""
        super()._check_inf_per_device(optimizer)  # type: ignore[misc]
        return self._reduce(optimizer)

    def _reduce(self, optimizer: Any) -> dict[Any, Tensor]:
        """Whether any rank of the mesh overflowed; a rank without gradients has no entry of its own."""
        if not self._enabled or not dist.is_initialized():  # type: ignore[attr-defined]
            return {}
        state = self._per_optimizer_states[id(optimizer)]  # type: ignore[attr-defined]
        found = torch.zeros_like(self._scale)  # type: ignore[attr-defined]
        for value in state["found_inf_per_device"].values():
            found = torch.maximum(found, value.to(found.device))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        state["found_inf_per_device"] = {found.device: found}
        return state["found_inf_per_device"]  # type: ignore[no-any-return]


def mesh_aware(plugin: Any, strategy: Any) -> Any:
    """The same plugin object, with the mesh of ``strategy`` in its clipping and in its gradient scaler.

    Lightning picks plugins for its own strategies by their classes, so the class is changed after the choice.
    """
    _mix_in(plugin, MeshClipping)
    if getattr(plugin, "scaler", None) is not None:
        _mix_in(plugin.scaler, MeshScaling)
    plugin.januspipe_strategy = strategy
    return plugin


def loss_scale(plugin: Any) -> float:
    """What a plugin's gradient scaler multiplies losses by; 1 without one."""
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _mix_in(target: Any, mixin: type) -> None:
    if not isinstance(target, mixin):
        cls = type(target)
        target.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
