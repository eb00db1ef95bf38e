"""Computes norms of the gradients of the whole model, to log and to clip by: each rank has the gradients of a part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.runtime.runner import Runner


def grad_norm(module: Any, norm_type: float | str = 2.0, group_separator: str = "/") -> dict[str, Tensor]:
    """Returns the norms of the gradients of the whole model, on every rank.

    A rank of a pipeline has the gradients of its own stages only, so ``lightning.pytorch.utilities.grad_norm`` returns
    the norms of these. This function returns the same entries for the parameters of all stages. Under other strategies
    it returns what Lightning's function returns. Call it on every rank, for example in ``on_before_optimizer_step``.

    Args:
        module: The LightningModule.
        norm_type: The p of the p-norm; ``"inf"`` for the largest absolute entry.
        group_separator: The text between the kind of norm and the parameter's name.

    Returns:
        ``grad_{p}_norm/{name}`` for each parameter that has a gradient, and ``grad_{p}_norm_total`` for all together.

    Raises:
        ValueError: ``norm_type`` is not positive.

    Example:
        >>> def on_before_optimizer_step(self, optimizer):
        ...     self.log_dict(grad_norm(self, norm_type=2))
    """
    power = float(norm_type)
    if power <= 0:
        raise ValueError(f"norm_type={norm_type!r}; expected a positive number, or 'inf'")
    named = dict(module.named_parameters())
    strategy = module.trainer.strategy
    runner: Runner | None = getattr(strategy, "runner", None)
    norms = torch.zeros(2, len(named), dtype=torch.float64, device=strategy.root_device)
    gradients = {p: p.grad for p in named.values()} if runner is None else runner.parameters.gradients()
    for index, parameter in enumerate(named.values()):
        gradient = gradients.get(parameter)
        if gradient is not None and (runner is None or runner.parameters.owns(parameter)):
            norms[0, index] = gradient.detach().norm(power)
            norms[1, index] = 1.0
    if runner is not None and strategy.mesh.shape.pipeline > 1:
        with waiting("norms of gradients over stages", strategy.mesh.pipeline_group):
            dist.all_reduce(norms, group=strategy.mesh.pipeline_group)
    prefix = f"grad_{power}_norm"
    found = {n: v for n, v, has in zip(named, norms[0], norms[1].tolist(), strict=True) if has}
    result = {f"{prefix}{group_separator}{n}": v for n, v in found.items()}
    return {**result, f"{prefix}_total": torch.stack(list(found.values())).norm(power)} if found else {}


def clip_gradients_by_norm(
    parameters: list[nn.Parameter], max_norm: float, placed: PlacedParameters, mesh: Mesh
) -> Tensor:
    """Scales the gradients so that their norm over the whole model is at most ``max_norm``.

    Args:
        parameters: The parameters of this rank's optimizer.
        max_norm: The largest norm.
        placed: Knows which rank counts a parameter that several stages share.
        mesh: This rank's process groups.

    Returns:
        The norm before clipping, the same on every rank.
    """
    counted = [p for p in parameters if p.grad is not None and placed.owns(p)]
    experts = [p for p in counted if placed.is_spread(p) and not placed.is_in_shards(p)]
    square = _sum_of_squares([p for p in counted if all(p is not e for e in experts)], mesh)
    if placed.shards:
        with waiting("clipping of gradients over replicas and graph ranks", mesh.stage_group):
            dist.all_reduce(square, group=mesh.stage_group)
    if placed.experts is not None:
        of_experts = _sum_of_squares(experts, mesh)
        with waiting("clipping of gradients over ranks with experts", mesh.expert_group):
            dist.all_reduce(of_experts, group=mesh.expert_group)
        square += of_experts
    if mesh.shape.pipeline > 1:
        with waiting("clipping of gradients over stages", mesh.pipeline_group):
            dist.all_reduce(square, group=mesh.pipeline_group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm


def _sum_of_squares(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for parameter in parameters:
        if parameter.grad is not None:
            square += parameter.grad.detach().to(torch.float64).square().sum()
    return square
