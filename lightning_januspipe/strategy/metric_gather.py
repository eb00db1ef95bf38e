"""Lets torchmetrics gather states over the replicas only: ranks of a pipeline see the same samples."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.distributed import waiting


class ReplicaGather:
    """Gathers the states of metrics over the replicas.

    If another group is the default one (see :func:`~lightning_januspipe.mesh.as_world`), for example while one rank
    captures, states are gathered over that group.

    The metrics of a module get it as their ``dist_sync_fn``. Setting their ``process_group`` would make the module
    impossible to pickle, for example as a hyper-parameter in a checkpoint. In a pickle it becomes None, which is the
    value it replaced.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._world: Any = None

    def attach(self, module: nn.Module, group: Any) -> None:
        """Lets the metrics in a module gather over a group, unless they have a function or a group of their own."""
        self._group, self._world = group, dist.group.WORLD
        for metric in _metrics(module):
            if metric.dist_sync_fn is None and metric.process_group is None:
                metric.__dict__["dist_sync_fn"] = self

    def detach(self, module: nn.Module) -> None:
        """Leaves the metrics as they were. Copies that were made in between gather over all ranks from then on."""
        self._group = None
        for metric in _metrics(module):
            if metric.dist_sync_fn is self:
                metric.__dict__["dist_sync_fn"] = None

    def __call__(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """Returns the state of every replica."""
        from torchmetrics.utilities.distributed import gather_all_tensors

        world = dist.group.WORLD
        group = group or (self._group if world is self._world else world)
        with waiting("reduction of a metric over replicas", group):
            return gather_all_tensors(state, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaGather:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return {}.get, (0,)  # None, without a name of this package in the pickle


def _metrics(module: nn.Module) -> list[Any]:
    names = ("dist_sync_fn", "dist_sync_on_step", "process_group")
    return [m for m in module.modules() if all(hasattr(m, n) for n in names)]
