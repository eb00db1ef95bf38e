"""Keeps the optimizers of one rank, and puts them into checkpoints with the user's own keys.

A checkpoint in one file is what plain Lightning writes: it loads with ``strategy="auto"``, and the other way round.
Optimizer state goes from rank to rank by parameter, never by the index in a rank's optimizer: these indices collide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_januspipe.checkpoint.io import copy_from_file
from lightning_januspipe.distributed import waiting
from lightning_januspipe.errors import WITHOUT_CAPTURE, PipelineError
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.expert_shards import require_element_wise
from lightning_januspipe.runtime.optimizer_shards import OptimizerShards, to_cpu
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.schedule.state_actions import ShardLevel


class StageOptimizer:
    """Keeps in an optimizer only what this rank trains, and puts the whole together again for a checkpoint.

    Args:
        optimizer: The user's optimizer over the whole module.
        parameters: The module's parameters, with the ranks that train them.
        names: Names of all parameters of the module.
        state: State of a checkpoint, by the indices of the optimizer over the whole module; by default the optimizer
            keeps its own.
        mesh: This rank's process groups, if the state is sharded over the ranks that hold the same stages.
        level: What these ranks share.

    Raises:
        ValueError: The optimizer holds parameters that the module does not have.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: PlacedParameters,
        names: Mapping[nn.Parameter, str],
        state: Mapping[int, Any] | None = None,
        mesh: Mesh | None = None,
        level: ShardLevel = "none",
    ) -> None:
        self.optimizer, self._parameters, self._names = optimizer, parameters, names
        self._groups: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        known = set(parameters.ranks_of)
        for group in self._groups:
            if any(p not in known for p in group):
                raise ValueError(
                    "the optimizer holds parameters that are not parameters of the LightningModule; return from "
                    "configure_optimizers an optimizer over self.parameters() or a part of it"
                )
        self._known = known
        if parameters.experts is not None:
            require_element_wise(optimizer)
            parameters.experts.optimizers.append(optimizer)
        self._shards: OptimizerShards | None = None
        self._shards_of: dict[nn.Parameter, OptimizerShards] = {}  # with those of experts
        self._writes_whole = True
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self._require_same_groups())]
        if mesh is not None:
            trained = [p for group in self._groups for p in group if parameters.holds(p) and p.requires_grad]
            held = [p for p in trained if not parameters.is_spread(p)]
            releases = level == "parameters"
            self._shards = OptimizerShards(held, optimizer, mesh.stage_holders, parameters.stage_of, releases, names)
            every = [self._shards, *self._shards_of_experts(trained, mesh, names)]
            parameters.shards += every
            self._shards_of = {p: shards for shards in every for p in shards.parameters}
            self._writes_whole = mesh.stage_rank == 0
            self._hooks.append(optimizer.register_step_post_hook(self._spread_updates))
        self._prune()
        if state is not None:
            self._load_held(state)

    def _shards_of_experts(
        self, trained: Sequence[nn.Parameter], mesh: Mesh, names: Mapping[nn.Parameter, str]
    ) -> list[OptimizerShards]:
        """Returns the shards of experts' state, if other ranks have the same experts."""
        experts, holders = self._parameters.experts, mesh.expert_holders
        if experts is None or holders is None:
            return []
        with experts.own_shapes():
            spread = [p for p in trained if p in experts]
            shards = OptimizerShards(spread, self.optimizer, holders, lambda _: None, names=names)
        experts.state_shards[self.optimizer] = shards
        return [shards]

    @property
    def has_parts(self) -> bool:
        """Tells whether each rank that holds the stages has a part of the state, also after training."""
        return self._shards is not None

    def load(self, saved: Mapping[str, Any]) -> None:
        """Loads what this rank trains from the state of the optimizer over the whole module."""
        self.make_whole()
        saved = indexed_state(saved, self.optimizer, self._names)
        self._prune()
        for group, other in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in other.items() if k != "params"})
        self._load_held(saved["state"])

    def release(self) -> bool:
        """Leaves the optimizer as the user made it; it keeps the state of what this rank has trained as a whole.

        Returns:
            Whether all parameters are there, as they are unless an error has ended the run between two steps.
        """
        self.make_whole()
        for hook in self._hooks:
            hook.remove()
        self._parameters.allow_gradients()
        if self._shards is not None:
            states = self._shards.states(self.optimizer)
            whole = {p: states.get(leaf) for leaf, p in self._shards.parameter_of.items() if leaf.shape == p.shape}
            for shards in self._every_shards():
                shards.take_states(self.optimizer)
            self.optimizer.state.update({p: state for p, state in whole.items() if state is not None})
            return self._shards.dissolve()
        return True

    def _spread_updates(self, *_: Any) -> None:
        self._parameters.allow_gradients()
        for shards in self._every_shards():
            shards.spread_updates()

    def _every_shards(self) -> list[OptimizerShards]:
        return list(dict.fromkeys(self._shards_of.values()))

    def make_whole(self) -> None:
        """Gives the optimizer its own parameter groups back, as the user made them."""
        # A group that the user has added meanwhile is an error, which is under way when this runs.
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=False):
            group["params"] = parameters

    def _prune(self) -> None:
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [leaf for p in parameters if (leaf := self._leaf(p)) is not None]
        for parameter in self._known:
            leaf = self._leaf(parameter)
            if (leaf is not parameter or self._parameters.is_spread(parameter)) and parameter in self.optimizer.state:
                state = self.optimizer.state.pop(parameter)
                if leaf is not None:
                    self.optimizer.state[leaf] = self._own_part(parameter, state)

    def _leaf(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """Returns what the optimizer of this rank updates of a parameter: all, a part, or None."""
        if not self._parameters.holds(parameter):
            return None
        shards = self._shards_of.get(parameter)  # None if it is frozen; it may have a state from before
        return parameter if shards is None else shards.leaves.get(parameter)

    def _own_part(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> Mapping[str, Any]:
        experts, shards = self._parameters.experts, self._shards_of.get(parameter)
        if experts is not None and parameter in experts:
            state = experts.part_of_state(parameter, state)
        return state if shards is None else shards.part_of_state(parameter, state)

    def _load_held(self, state: Mapping[int, Any]) -> None:
        held = self.optimizer.state_dict()
        order = [p for group in self._groups for p in group if self._leaf(p) is not None]
        index = {p: i for i, p in enumerate(p for group in self._groups for p in group)}
        held["state"] = {i: self._own_part(p, state[index[p]]) for i, p in enumerate(order) if index[p] in state}
        self.optimizer.load_state_dict(held)
        copy_from_file(self.optimizer.state)

    def own_state_dict(self) -> dict[str, Any]:
        """Returns what this rank writes into a folder: the state of parameters that it owns and all groups, by name.

        If the state is sharded, each rank that holds the stage has a part of it.
        """
        self._require_same_groups()
        if self._shards is None:
            owned = self._owned_states()
        else:
            owned = {**self._whole_states(), **self._shards.own_states(self.optimizer)}
        state = {self._names[p]: state for p, state in owned.items() if self._parameters.owns(p)}
        names = [[self._names[p] for p in parameters] for parameters in self._groups]
        return {"state": state, "param_groups": _groups(self.optimizer, names)}

    def full_state_dict(self, mesh: Mesh) -> dict[str, Any]:
        """Returns the state dict of the optimizer over the whole module; every rank of a pipeline takes part."""
        if mesh.aborted:
            raise PipelineError("no checkpoint can be gathered: this pipeline has ended with an error before")
        order = [p for group in self._groups for p in group]
        owned = self._owned_states()
        mine = {i: to_cpu(owned[p]) for i, p in enumerate(order) if p in owned}
        found: list[Any] | None = [mine]
        if mesh.shape.pipeline > 1:
            found = [None] * mesh.shape.pipeline if mesh.pipeline_rank == 0 else None
            with waiting("gathering of optimizer states", mesh.control_group):
                dist.gather_object(mine, found, mesh.pipeline_ranks[0], group=mesh.control_group)
        state: dict[int, Any] = {}
        for part in found or ():
            state.update(part)
        numbers = iter(range(len(order)))
        indices = [[next(numbers) for _ in parameters] for parameters in self._groups]
        return {"state": dict(sorted(state.items())), "param_groups": _groups(self.optimizer, indices)}

    def _owned_states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns the states of the parameters that this rank writes into a checkpoint."""
        self._require_same_groups()
        states = self._whole_states()
        if self._shards is not None:
            states.update(self._shards.whole_states(self.optimizer))
        return {p: state for p, state in states.items() if self._parameters.owns(p)}

    def _whole_states(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns the states of parameters that are in no shards, on the ranks that write these."""
        every = [p for group in self._groups for p in group if p not in self._shards_of] if self._writes_whole else []
        states = {p: self.optimizer.state[p] for p in every if p in self.optimizer.state}
        experts = self._parameters.experts
        if experts is None:
            return states
        return {p: s for p, s in states.items() if p not in experts} | experts.whole_states(self.optimizer)

    def _require_same_groups(self) -> None:
        if len(self.optimizer.param_groups) != len(self._groups):
            raise ValueError(
                f"the optimizer has {len(self.optimizer.param_groups)} parameter groups, but had {len(self._groups)} "
                "when training started. Make all groups in configure_optimizers, or train "
                f"with {WITHOUT_CAPTURE}, and shard='none'."
            )


def named_state_dict(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Returns the state of an optimizer over the whole module, by the parameters' names."""
    keys = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    state = {name: optimizer.state[p] for p, name in names.items() if p in optimizer.state}
    return {"state": state, "param_groups": _groups(optimizer, keys)}


def indexed_state(saved: Mapping[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Returns a saved state by the indices of an optimizer, whether it was saved by names or by indices.

    Args:
        saved: What a checkpoint holds.
        optimizer: The optimizer over the whole module.
        names: Names of the module's parameters.

    Raises:
        ValueError: The checkpoint's optimizer is of another kind, or has other parameters.
    """
    groups = saved["param_groups"]
    _require_same_kind(groups, optimizer)
    if not any(isinstance(key, str) for group in groups for key in group["params"]):
        return dict(saved)
    here = [[names.get(p, "") for p in group["params"]] for group in optimizer.param_groups]
    there = [list(group["params"]) for group in groups]
    if [sorted(g) for g in here] != [sorted(g) for g in there]:
        ours, theirs = {n for g in here for n in g}, {n for g in there for n in g}
        what = sorted(ours ^ theirs)[:3] or "the same parameters in other groups"
        raise ValueError(
            f"the checkpoint's optimizer has {[len(g) for g in there]} parameters in its groups, and this one "
            f"{[len(g) for g in here]}; they differ in {what}. Resume with the same configure_optimizers."
        )
    index = {name: i for i, name in enumerate(n for g in here for n in g)}
    state = {index[name]: s for name, s in saved.get("state", {}).items()}
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**g, "params": [index[n] for n in n_here]} for g, n_here in zip(groups, here, strict=True)],
    }


_OF_ANY_KIND = frozenset(
    ("params", "name", "foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
)
"""Entries of parameter groups that tell nothing of the kind of an optimizer: some releases of torch have fewer."""

_OF_SCHEDULERS = frozenset(("initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"))


def _require_same_kind(groups: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    saved = {key for group in groups for key in group}
    here = {key for group in optimizer.param_groups for key in group}
    missing = optimizer.defaults.keys() - saved - _OF_ANY_KIND
    unknown = saved - here - _OF_ANY_KIND - _OF_SCHEDULERS
    if missing and unknown:
        raise ValueError(
            f"the checkpoint was saved by another optimizer: its groups have {', '.join(sorted(unknown))}, and here "
            f"those of {type(optimizer).__name__} have {', '.join(sorted(missing))}. Resume with the same "
            "configure_optimizers, or load the weights alone, without ckpt_path."
        )


def _groups(optimizer: Optimizer, keys: list[list[Any]]) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": params}
        for group, params in zip(optimizer.param_groups, keys, strict=True)
    ]
