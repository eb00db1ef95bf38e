"""Places the parameters of a module on the ranks that train them, reduces their gradients, and synchronizes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.checkpoint.averages import followers, held_by_all
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.stage_state import Collective
from lightning_januspipe.errors import WITHOUT_CAPTURE
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.expert_shards import ExpertShards
from lightning_januspipe.runtime.optimizer_shards import OptimizerShards
from lightning_januspipe.runtime.released import allow_gradient, guard_gradient
from lightning_januspipe.runtime.state_units import StateUnit
from lightning_januspipe.schedule import Link, StateCosts
from lightning_januspipe.schedule.state_actions import ShardLevel


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
        sums: The parameter gradients of the present step, before they are accumulated into ``.grad`` or reduced.
        experts: The parameters with an entry for each expert, if experts are spread over ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        stages: Mapping[nn.Parameter, set[int]],
        placements: Sequence[Sequence[int]] = ((0,),),
    ) -> None:
        self._module, self._mesh, self._read = module, mesh, stages
        self.sums = GradientBuffers()
        every_stage = frozenset(range(len(placements[0])))
        self._every_rank = frozenset(range(mesh.shape.pipeline))
        self.stages_of: dict[nn.Parameter, frozenset[int]] = {}
        self.ranks_of: dict[nn.Parameter, frozenset[int]] = {}
        self.shards: list[OptimizerShards] = []
        self.experts: ExpertShards | None = None
        self._earlier: dict[nn.Parameter, Tensor] | None = None
        self._trained = {n for n, p in module.named_parameters() if p.requires_grad}
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

    def stage_of(self, parameter: nn.Parameter) -> int | None:
        """Returns the stage that reads a parameter, if no other stage, no other rank and no user's step does."""
        if not self._read:  # the whole module is one stage
            return 0
        found = self._read.get(parameter, ())
        return next(iter(found)) if len(found) == len(self._ranks(parameter)) == 1 else None

    def require_same_trained(self) -> None:
        """Raises an error if parameters were frozen or unfrozen after stages and shards were made.

        Raises:
            ValueError: ``requires_grad`` of a parameter has changed.
        """
        changed = self._trained ^ {n for n, p in self._module.named_parameters() if p.requires_grad}
        if changed:
            raise ValueError(
                f"requires_grad of {', '.join(sorted(changed)[:3])} was changed after training had started, when "
                "stages and shards were made. Freeze and unfreeze before Trainer.fit, or train with "
                f'{WITHOUT_CAPTURE}, and shard="none".'
            )

    def gradients(self) -> dict[nn.Parameter, Tensor | None]:
        """Returns the reduced gradients of the parameters that this rank trains; all ranks have to call this."""
        sharded = set(self._in_shards())
        every = [p for p in self._module.parameters() if p not in sharded]
        found = {p: p.grad for p in every if p.requires_grad and self.holds(p)}
        for shards in self.shards:
            found |= shards.gradients()
        return found if self.experts is None else found | self.experts.gradients(found)

    def is_spread(self, parameter: nn.Parameter) -> bool:
        """Returns whether this rank trains its own experts' entries of a parameter only."""
        return self.experts is not None and parameter in self.experts

    def is_in_shards(self, leaf: nn.Parameter) -> bool:
        """Returns whether what this rank's optimizer updates is a shard of its parameters' state."""
        return any(leaf in shards.parameter_of for shards in self.shards)

    @property
    def is_accumulating(self) -> bool:
        """Tells whether gradients of earlier batches wait to be summed with those of the next batch."""
        return self._earlier is not None

    def make_experts_whole(self) -> bool:
        """Gives parameters the entries of all experts until :meth:`keep_own_experts`, at the next step at the latest.

        The ranks with the stages take part. Gradients of experts are put aside until then.

        Returns:
            Whether this rank had its own experts only.
        """
        if self.experts is None or self.experts.are_whole:
            return False
        self.experts.make_whole()
        return True

    def keep_own_experts(self) -> None:
        """Frees the entries of other ranks' experts."""
        if self.experts is not None:
            self.experts.keep_own()

    def local_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields the gradients of this rank before they are reduced, some of them in parts, with their names."""
        names = {p: n for n, p in self._module.named_parameters()}
        yield from ((n, p.grad) for p, n in names.items())
        yield from ((names[p], g) for unit in self._units() for p, g in unit.local_gradients())
        yield from ((names[p], g) for p, g in self.sums.items())

    # -- sharded state, as the executor changes it (see engine/stage_state.py) -----------------------------------------

    def unshard(self, stage: int | None = None) -> list[Collective]:
        """Starts to gather the parameters of a stage, by default of all stages of this rank."""
        for unit in self._units(stage):
            unit.start_gathering()
        return [work for unit in self._units(stage) for work in unit.gathering]

    def wait_for_parameters(self, stage: int | None = None) -> None:
        """Waits until the parameters of a stage are there, by default those of all stages of this rank."""
        for unit in self._units(stage):
            unit.wait_for_parameters()

    def reshard(self, stage: int | None = None) -> None:
        """Releases the parameters of a stage, by default those of all stages of this rank."""
        for unit in self._units(stage):
            unit.release()

    def reduce(self, stage: int) -> list[Collective]:
        """Starts to reduce the gradients of a stage."""
        for unit in self._units(stage):
            unit.start_reduction(self.sums.take)
        return [work for unit in self._units(stage) for work in unit.reduction]

    def gradient_tensors(self) -> list[Tensor]:
        """Returns the gradients that are kept beside ``.grad``."""
        return [*self.sums.sums(), *(tensor for unit in self._units() for tensor in unit.reduced_tensors)]

    def make_whole(self) -> None:
        """Gathers all parameters of this rank's stages until they are released; all ranks have to call this."""
        self.unshard()
        self.wait_for_parameters()

    def make_averaged_whole(self) -> None:
        """Gathers the parameters that have to be there between steps; all ranks have to call this."""
        for unit in [unit for shards in self.shards if shards.keeps_whole for unit in shards.units]:
            unit.start_gathering()
            unit.wait_for_parameters()

    def describe_shards(self, level: ShardLevel, link: Link) -> str:
        """Returns in words what the ranks that hold this rank's stages share, and what that costs.

        Args:
            level: What they share.
            link: Costs of a message between two of them.
        """
        size = self._mesh.shape.data * self._mesh.shape.graph
        units = [unit for unit in self._units() if unit.num_ranks == size]  # those of experts have fewer
        whole = sum(p.numel() * p.element_size() for unit in units for p in unit.parameters)
        gathered = sum(p.numel() * p.element_size() for unit in units if unit.releases for p in unit.parameters)
        words = f"{size} ranks hold the stages of rank 0, and each has 1/{size} of their optimizer state"
        if level == "parameters":
            words += f", and of {gathered / 1e6:.3g} MB of parameters between steps"
        passes, costs = size - 1, StateCosts.of(size, whole, link)
        return (
            f"{words}; in a step a rank sends 2 × {whole * passes / size / 1e6:.3g} MB in {2 * passes * len(units)} "
            f"messages, to reduce gradients and to gather {'parameters' if gathered else 'updated parameters'}: about "
            f"2 × {1e3 * costs.gather:.3g} ms, as messages were measured"
        )

    def in_parts(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a state of the module with this rank's parts in the place of parameters that are in shards."""
        parts = {p: part for shards in self.shards for p, part in shards.own_parameters().items()}
        names = {n: p for n, p in self._module.named_parameters() if p in parts}
        found = {n: parts[names[n]] if n in names else value for n, value in state.items()}
        found = {n: value for n, value in found.items() if value is not None or n not in names}
        return {n: v.detach() if isinstance(v, nn.Parameter) else v for n, v in found.items()}

    def shares_memory(self, tensor: Tensor) -> bool:
        """Returns whether the memory of a tensor is released when parameters are."""
        return any(unit.holds(tensor) for unit in self._units())

    def _units(self, stage: int | None = None) -> Iterator[StateUnit]:
        """Yields the units of sharded state of a stage, or all, in the order of stages."""
        every = [unit for shards in self.shards for unit in shards.units if stage is None or unit.stage == stage]
        yield from sorted(every, key=lambda unit: (unit.stage is None, unit.stage or 0))

    def _ranks(self, parameter: nn.Parameter) -> frozenset[int]:
        for shards in self.shards:
            parameter = shards.parameter_of.get(parameter, parameter)
        return self.ranks_of.get(parameter, self._every_rank)  # a module may get parameters later

    def partly_held(self) -> list[nn.Parameter]:
        """Returns the parameters that only some ranks of the pipeline train."""
        return [p for p, ranks in self.ranks_of.items() if len(ranks) < self._mesh.shape.pipeline]

    def accumulate_gradients(self, factor: float) -> None:
        """Adds the sums of this step to ``.grad``, but for those that are reduced from where they are.

        What an earlier step has left there, since no optimizer sets it to zero, was reduced and is put aside.

        Args:
            factor: What gradients are multiplied by.
        """
        if self._earlier is None:
            self._earlier = {p: p.grad for p in self._module.parameters() if p.grad is not None}
            for parameter in self._earlier:
                parameter.grad = None
        self.sums.accumulate_into_grad(
            factor, {p for unit in self._units() if unit.stage is not None for p in unit.parameters}
        )

    def reduce_gradients(self, factor: float = 1.0) -> None:
        """Sums ``.grad`` over the ranks of the pipeline that train a parameter and over graph ranks.

        Over replicas the gradients are averaged. Of a parameter in shards, this rank's leaves get their part.

        Args:
            factor: What gradients that were not added to ``.grad`` are multiplied by.
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
        sharded = set(self._in_shards())
        held = [p for p in every if self.holds(p) and p not in sharded and not self.is_spread(p)]
        if mesh.graph_group is not None:
            with waiting("reduction of gradients over graph ranks", mesh.graph_group, mixed=True):
                reduce_gradients(held, mesh.graph_group)
        if mesh.shape.data > 1:
            assert mesh.data_group is not None
            with waiting("reduction of gradients over replicas", mesh.data_group, mixed=True):
                reduce_gradients(held, mesh.data_group, divide_by=mesh.shape.data)
        if self.experts is not None:
            self.experts.reduce_gradients()
        self._finish_reductions(factor)
        for parameter, gradient in (self._earlier or {}).items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._earlier = None
        if self.shards:
            names = {p: n for n, p in self._module.named_parameters()}
            for parameter, leaf in self._in_shards().items():
                if leaf is not parameter:
                    guard_gradient(parameter, names.get(parameter, "a parameter"))

    def allow_gradients(self) -> None:
        """Lets ``.grad`` of parameters in shards be read again, as it may be until gradients are reduced."""
        for parameter in self._in_shards():
            allow_gradient(parameter)

    def _in_shards(self) -> dict[nn.Parameter, nn.Parameter | None]:
        """Returns the parameters of all shards, with what this rank's optimizer updates of each."""
        return {p: shards.leaves.get(p) for shards in self.shards for p in shards.parameters}

    def _finish_reductions(self, factor: float) -> None:
        """Waits for the reductions of shards; starts those that no phase has started."""
        units = list(self._units())
        for unit in reversed(units):
            if unit.stage is None:
                unit.start_reduction(lambda parameter: parameter.grad)
                for parameter in unit.parameters:
                    parameter.grad = None
            else:
                unit.start_reduction(self.sums.take)
        for unit in units:
            unit.finish_reduction((1.0 if unit.stage is None else factor) / self._mesh.shape.data)

    def synchronize(self, holders: Sequence[object] = (), averages_only: bool = False) -> None:
        """Copies all parameters, and averages of them, from their owners to every rank of the pipeline.

        Args:
            holders: Objects beside the module that may hold averages, such as callbacks.
            averages_only: Leave the parameters themselves as they are.
        """
        mesh = self._mesh
        if not averages_only:
            self.make_whole()
        self.make_experts_whole()
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
