"""Optimizers of one stage, and consolidated checkpoints with the user's own keys.

A checkpoint is what plain Lightning writes: it loads with ``strategy="auto"`` and the reverse. Optimizer state travels
between ranks by parameter, never by index, since indices of different stages collide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_januspipe.engine.p2p import PipelineError
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.pipeline import Pipeline


class StageOptimizer:
    """Keeps in an optimizer only what this rank trains, and puts the whole together again for a checkpoint.

    Args:
        optimizer: made by the user over the whole module, with the state of a checkpoint if one was loaded.
        pipeline: this rank's stage.
    """

    def __init__(self, optimizer: Optimizer, pipeline: Pipeline) -> None:
        self.optimizer, self._pipeline = optimizer, pipeline
        self._groups: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        known = set(pipeline.ranks_of)
        for parameters in self._groups:
            if any(p not in known for p in parameters):
                raise ValueError(
                    "the optimizer holds parameters that are not parameters of the LightningModule; return from "
                    "configure_optimizers an optimizer over self.parameters() or a part of it"
                )
        self._known = known
        self._prune()

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the state of the optimizer over the whole module."""
        self.make_whole()
        self.optimizer.load_state_dict(dict(state))
        self._prune()

    def make_whole(self) -> None:
        """Give the optimizer its own parameter groups back, as the user made them."""
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = parameters

    def _prune(self) -> None:
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [p for p in parameters if self._pipeline.holds(p)]
        for parameter in self._known:
            if not self._pipeline.holds(parameter):
                self.optimizer.state.pop(parameter, None)

    def full_state_dict(self, mesh: Mesh) -> dict[str, Any]:
        """The state dict that the optimizer over the whole module would have; every rank of a pipeline takes part."""
        if mesh.aborted:
            raise PipelineError("no checkpoint can be gathered: this pipeline has ended with an error before")
        if len(self.optimizer.param_groups) != len(self._groups):
            raise ValueError(
                f"the optimizer has {len(self.optimizer.param_groups)} parameter groups, but had {len(self._groups)} "
                "when training started. Make all groups in configure_optimizers, or train with pipeline_size=1."
            )
        order = [p for group in self._groups for p in group]
        mine = {
            i: _to_cpu(self.optimizer.state[p])
            for i, p in enumerate(order)
            if p in self.optimizer.state and self._pipeline.owns(p)
        }
        found: list[Any] = [None] * mesh.shape.pipeline
        dist.all_gather_object(found, mine, group=mesh.control_group)
        state: dict[int, Any] = {}
        for part in found:
            state.update(part)
        groups, start = [], 0
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            rest = {k: v for k, v in group.items() if k != "params"}
            groups.append({**rest, "params": list(range(start, start + len(parameters)))})
            start += len(parameters)
        return {"state": dict(sorted(state.items())), "param_groups": groups}


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _to_cpu(v) for k, v in value.items()}
    return value


def broadcast_module(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of global rank 0, as data-parallel training does at its start."""
    tensors = [*module.parameters(), *module.buffers()]
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype and t.numel()]
        if not same:
            continue
        flat = torch.cat([t.detach().reshape(-1) for t in same])
        dist.broadcast(flat, 0)
        for tensor, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.data.copy_(values.view_as(tensor))
