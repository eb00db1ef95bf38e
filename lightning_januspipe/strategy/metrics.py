"""``self.log`` under micro-batches, where a step that runs once per micro-batch logs each value once; torchmetrics.

The value is the mean over the micro-batches, weighted with their batch sizes, which is what Lightning's own epoch mean
makes of the same values; a ``reduce_fx`` of max, min or sum is applied likewise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicaGather:
    """Gathers the states of torchmetrics over the data-parallel replicas: ranks of a pipeline see the same samples.

    Where another group stands for the world meanwhile, as that of one rank while it captures, it gathers over that.

    It is the ``dist_sync_fn`` of the module's metrics, and not their ``process_group``, because modules are pickled
    with their metrics (as hyperparameters in a checkpoint, say), and process groups cannot be. In a pickle it is None,
    as it was before.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._world: Any = None

    def attach(self, module: nn.Module, group: Any) -> None:
        """Let the metrics in a module gather over a group, but for those that have a way of their own."""
        self._group, self._world = group, dist.group.WORLD
        for metric in _metrics(module):
            if metric.dist_sync_fn is None and metric.process_group is None:
                metric.__dict__["dist_sync_fn"] = self

    def detach(self, module: nn.Module) -> None:
        """Leave the metrics as they were; copies of them gather over all ranks then."""
        self._group = None
        for metric in _metrics(module):
            if metric.dist_sync_fn is self:
                metric.__dict__["dist_sync_fn"] = None

    def __call__(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """The state of every replica."""
        from torchmetrics.utilities.distributed import gather_all_tensors

        world = dist.group.WORLD
        return gather_all_tensors(state, group or (self._group if world is self._world else world))

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaGather:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return {}.get, (0,)  # None, without a name of this package in the pickle


def grad_norm(module: Any, norm_type: float | str = 2.0, group_separator: str = "/") -> dict[str, Tensor]:
    """Norms of the gradients of the whole model, on every rank.

    A rank of a pipeline has the gradients of its own stages, so ``lightning.pytorch.utilities.grad_norm`` gives their
    norms only. This gives the same entries, under the same names, for all stages; and the same as Lightning's under
    any other strategy. Call it on every rank, as in ``on_before_optimizer_step``.

    Args:
        module: the LightningModule.
        norm_type: p of the p-norm; ``"inf"`` for the largest entry.
        group_separator: between the kind of norm and the parameter's name.

    Returns:
        ``grad_{p}_norm/{name}`` of each parameter that has a gradient, and ``grad_{p}_norm_total`` of all together.

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
    runner: Any = getattr(strategy, "runner", None)
    mesh: Any = getattr(strategy, "mesh", None)
    is_divided = mesh is not None and mesh.shape.pipeline > 1 and runner is not None
    norms = torch.zeros(2, len(named), dtype=torch.float64, device=strategy.root_device)
    for index, parameter in enumerate(named.values()):
        if parameter.grad is not None and (not is_divided or runner.owns(parameter)):
            norms[0, index] = parameter.grad.detach().norm(power)
            norms[1, index] = 1.0
    if is_divided:
        dist.all_reduce(norms, group=mesh.pipeline_group)
    prefix = f"grad_{power}_norm"
    found = {n: v for n, v, has in zip(named, norms[0], norms[1].tolist(), strict=True) if has}
    result = {f"{prefix}{group_separator}{n}": v for n, v in found.items()}
    return {**result, f"{prefix}_total": torch.stack(list(found.values())).norm(power)} if found else {}


def _metrics(module: nn.Module) -> list[Any]:
    names = ("dist_sync_fn", "dist_sync_on_step", "process_group")
    return [m for m in module.modules() if all(hasattr(m, n) for n in names)]
