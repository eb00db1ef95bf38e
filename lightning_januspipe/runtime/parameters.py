"""Places the parameters of a module on the ranks that train them, reduces their gradients, and synchronizes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.checkpoint.averages import followers, held_by_all
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.gradients import reduce_gradients
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.optimizer_shards import OptimizerShards


class PlacedParameters:
    """Knows which ranks of a pipeline train each parameter, and keeps gradients and copies in step.

    Every rank has the whole module. It trains the parameters that its stages read, and those that no stage reads: every
    rank evaluates the loss, so every rank needs the parameters outside the potential. The values of all others go stale
    until :meth:`synchronize`.

    Args:
        module: The LightningModule, the same on all ranks.
        mesh: This rank's process groups.
        stages: The stages that read a parameter; all stages where a parameter is missing or read by none.
        placements: The rank of each stage; several, if a stage is split over two ranks.

    Attributes:
        stages_of: The stages that read each parameter.
        ranks_of: The ranks of the pipeline that train each parameter.
        shards: The shards of each optimizer's parameters, if optimizer state is sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        stages: Mapping[nn.Parameter, set[int]],
        placements: Sequence[Sequence[int]] = ((0,),),
    ) -> None:
        self._module, self._mesh = module, mesh
        every_stage = frozenset(range(len(placements[0])))
        self._every_rank = frozenset(range(mesh.shape.pipeline))
        self.stages_of: dict[nn.Parameter, frozenset[int]] = {}
        self.ranks_of: dict[nn.Parameter, frozenset[int]] = {}
        self.shards: list[OptimizerShards] = []
        for parameter in module.parameters():
            found = stages.get(parameter)
            self.stages_of[parameter] = frozenset(found or every_stage)
            self.ranks_of[parameter] = frozenset(p[s] for s in found for p in placements) if found else self._every_rank

    def holds(self, parameter: nn.Parameter) -> bool:
        """Returns whether this rank trains a parameter."""
        return self._mesh.pipeline_rank in self._ranks(parameter)

    def owns(self, parameter: nn.Parameter) -> bool:
        """Returns whether this rank counts a parameter in norms and checkpoints: one rank of a pipeline does."""
        return self.owner(parameter) == self._mesh.pipeline_rank

    def owner(self, parameter: nn.Parameter) -> int:
        """Returns the first rank of the pipeline that trains a parameter."""
        return min(self._ranks(parameter))

    def gradients(self) -> dict[nn.Parameter, Tensor | None]:
        """Returns the reduced gradients of the parameters that this rank trains; all ranks have to call this."""
        found = {p: p.grad for p in self._module.parameters() if p.requires_grad and self.holds(p)}
        for shards in self.shards:
            found |= shards.gradients()
        return found

    def _ranks(self, parameter: nn.Parameter) -> frozenset[int]:
        for shards in self.shards:
            parameter = shards.parameter_of.get(parameter, parameter)
        return self.ranks_of.get(parameter, self._every_rank)  # a module may get parameters later

    def partly_held(self) -> list[nn.Parameter]:
        """Returns the parameters that only some ranks of the pipeline train."""
        return [p for p, ranks in self.ranks_of.items() if len(ranks) < self._mesh.shape.pipeline]

    def reduce_gradients(self) -> None:
        """Sums ``.grad`` over the ranks of the pipeline that train a parameter and over graph ranks.

        Over replicas the gradients are averaged. Of a parameter in shards, this rank's leaves get their part.
        """
        mesh = self._mesh
        every = list(self._module.parameters())
        shared = [p for p in every if len(self._ranks(p)) > 1]
        if shared:
            assert mesh.pipeline_group is not None
            with waiting("reduction of gradients over stages", mesh.pipeline_group, mixed=True):
                reduce_gradients(shared, mesh.pipeline_group)
            for parameter in shared:
                if not self.holds(parameter):
                    parameter.grad = None
        sharded = set().union(*(shards.parameters for shards in self.shards))
        held = [p for p in every if self.holds(p) and p not in sharded]
        if mesh.graph_group is not None:
            with waiting("reduction of gradients over graph ranks", mesh.graph_group, mixed=True):
                reduce_gradients(held, mesh.graph_group)
        if mesh.shape.data > 1:
            assert mesh.data_group is not None
            with waiting("reduction of gradients over replicas", mesh.data_group, mixed=True):
                reduce_gradients(held, mesh.data_group, divide_by=mesh.shape.data)
        for shards in self.shards:
            shards.reduce_gradients()

    def synchronize(self, holders: Sequence[object] = (), averages_only: bool = False) -> None:
        """Copies all parameters, and averages of them, from their owners to every rank of the pipeline.

        Args:
            holders: Objects beside the module that may hold averages, such as callbacks.
            averages_only: Leave the parameters themselves as they are.
        """
        mesh = self._mesh
        if mesh.shape.pipeline == 1:
            return
        owners: dict[Tensor, int] = {} if averages_only else {p: self.owner(p) for p in self.ranks_of}
        owners.update((t, self.owner(p)) for p, t in self.averages(holders))
        by_owner: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for tensor, rank in owners.items():
            by_owner.setdefault((rank, tensor.dtype), []).append(tensor)
        for (rank, _), tensors in by_owner.items():
            flat = torch.cat([t.detach().reshape(-1).to(mesh.device) for t in tensors])
            with waiting("copying of parameters between stages", mesh.pipeline_group):
                dist.broadcast(flat, mesh.pipeline_ranks[rank], group=mesh.pipeline_group)
            for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.data.copy_(values.view_as(tensor))

    def averages(self, holders: Sequence[object] = ()) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns pairs of a parameter that only some ranks train and a tensor on every rank that averages it.

        Every rank of the pipeline has to call this.

        Args:
            holders: Objects beside the module that may hold averages, such as callbacks.
        """
        partly = self.partly_held()
        if not partly:
            return []
        found = followers(self._module, holders, partly)
        of_ranks = self._mesh.gathered_over_pipeline(list(found), "comparison of averages of parameters")
        common = held_by_all(of_ranks, len(partly))
        return [pair for place, pair in found.items() if place in common]
