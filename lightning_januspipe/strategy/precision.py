"""Any precision plugin of Lightning over a whole mesh: clipping by norm, and skipping a step that overflowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_januspipe.mesh import Mesh
    from lightning_januspipe.runtime.pipeline import Pipeline
    from lightning_januspipe.runtime.single_stage import SingleStage

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


def clip_gradients_by_norm(
    parameters: list[nn.Parameter], max_norm: float, runner: SingleStage | Pipeline, mesh: Mesh
) -> Tensor:
    """Scale gradients so that their norm over the whole model is at most ``max_norm``.

    Args:
        parameters: those of this rank's optimizer.
        max_norm: largest norm.
        runner: knows which rank counts a parameter that several stages hold.
        mesh: this rank's process groups.

    Returns:
        The norm before clipping, the same on every rank.
    """
    counted = [p.grad for p in parameters if p.grad is not None and runner.owns(p)]
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for gradient in counted:
        square += gradient.detach().to(torch.float64).square().sum()
    if mesh.shape.pipeline > 1:
        dist.all_reduce(square, group=mesh.pipeline_group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm
