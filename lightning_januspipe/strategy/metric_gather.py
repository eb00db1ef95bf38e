"""torchmetrics in a pipeline: their states are gathered over the replicas only."""

from __future__ import annotations

from typing import Any

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


def _metrics(module: nn.Module) -> list[Any]:
    names = ("dist_sync_fn", "dist_sync_on_step", "process_group")
    return [m for m in module.modules() if all(hasattr(m, n) for n in names)]
