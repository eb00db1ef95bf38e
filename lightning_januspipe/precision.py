"""Gradient clipping by norm over the whole mesh, for any precision plugin of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_januspipe.mesh import Mesh
    from lightning_januspipe.pipeline import Pipeline, Undivided

SUPPORTED = ("32-true", "64-true")


class MeshClipping:
    """Mixin for a precision plugin: ``clip_grad_by_norm`` counts every parameter of the pipeline once."""

    januspipe_strategy: Any

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip gradients by the norm over all stages."""
        strategy = self.januspipe_strategy
        if strategy.runner is None or strategy.mesh is None:
            super().clip_grad_by_norm(optimizer, clip_val)  # type: ignore[misc]
            return
        clip_gradients_by_norm(list(self.main_params(optimizer)), clip_val, strategy.runner, strategy.mesh)  # type: ignore[attr-defined]


def mesh_aware(plugin: Any, strategy: Any) -> Any:
    """The same plugin object, clipping over the mesh of ``strategy``.

    Lightning picks plugins for its own strategies by their classes, so the class is changed after the choice.
    """
    if not isinstance(plugin, MeshClipping):
        cls = type(plugin)
        plugin.__class__ = type(cls.__name__, (MeshClipping, cls), {"__module__": cls.__module__})
    plugin.januspipe_strategy = strategy
    return plugin


def clip_gradients_by_norm(
    parameters: list[nn.Parameter], max_norm: float, runner: Undivided | Pipeline, mesh: Mesh
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
