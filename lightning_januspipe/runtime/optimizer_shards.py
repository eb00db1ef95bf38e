"""Shards optimizer state: of the ranks that hold the same parameters, each updates a part of them.

These ranks are the D replicas times the G graph ranks of a stage; for experts, the ranks among these that own the same.
Their gradients are summed by a reduce-scatter, so that each rank gets the part that it updates; the updated values are
gathered after the optimizer's step, or, if the parameters are in shards too, before the next use. Both together send
the bytes of one all-reduce.

FSDP cannot do this for forces: its hooks break where a backward pass is differentiated again. Here all phases of a
stage have run before its gradients are reduced, so the sums are exact. (Janus, arXiv 2604.15821, shards the state of
its ranks too.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_januspipe.checkpoint.parts import Part
from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import Holders
from lightning_januspipe.runtime.state_units import StateUnit

ELEMENT_WISE: tuple[type[Optimizer], ...] = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.RMSprop),
    *(torch.optim.Adagrad, torch.optim.Adadelta),
)
"""Optimizers that update each entry of a parameter by itself, so that a shard may begin and end inside of one."""


_GATHERING = "gathering of sharded optimizer states"


class OptimizerShards:
    """Holds the shards of one optimizer's parameters, in units of one stage and one dtype.

    Every rank that holds the parameters makes it with the same ones, in the same order.

    Args:
        parameters: The parameters of the optimizer that this rank's stages train.
        optimizer: The optimizer; if it is none of :data:`ELEMENT_WISE`, a parameter is never cut, which is exact for
            every optimizer that treats parameters one by one.
        holders: The ranks that hold the parameters.
        stage_of: Returns the stage that alone reads a parameter; None if there is none.
        releases: Whether the parameters that one stage reads are in shards too.
        names: Names of the parameters, for errors.

    Attributes:
        units: The units, those of stages in the order of stages.
        leaves: What this rank's optimizer updates for each parameter: the parameter itself, or a tensor with its part.
        parameter_of: The parameter of each leaf.
        keeps_whole: Whether parameters in shards have to be there between steps.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        holders: Holders,
        stage_of: Callable[[nn.Parameter], int | None] = lambda _: None,
        releases: bool = False,
        names: Mapping[nn.Parameter, str] | None = None,
    ) -> None:
        self._holders = holders
        self._shapes = {p: p.shape for p in parameters}  # experts are in other shapes at times
        may_cut = type(optimizer) in ELEMENT_WISE
        same: dict[tuple[int | None, torch.dtype], list[nn.Parameter]] = {}
        for parameter in parameters:
            same.setdefault((stage_of(parameter), parameter.dtype), []).append(parameter)
        order = sorted(same.items(), key=lambda item: (item[0][0] is None, item[0][0] or 0))
        self.units = [
            StateUnit(found, stage, holders, may_cut, releases and stage is not None, names)
            for (stage, _), found in order
        ]
        self.keeps_whole = False
        self.leaves = {p: leaf for unit in self.units for p, leaf in unit.leaves.items()}
        self.parameter_of = {leaf: p for p, leaf in self.leaves.items()}
        self._own = {p: segment for unit in self.units for p, segment in unit.own.items()}
        self._left: dict[nn.Parameter, Any] | None = None

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Returns the parameters of all shards."""
        return {p for unit in self.units for p in unit.parameters}

    def dissolve(self) -> bool:
        """Ends the sharding of parameters; returns whether all are there, which they may not be after an error."""
        are_there = [unit.dissolve() for unit in self.units]
        return all(are_there)

    def refresh_leaves(self) -> None:
        """Lets leaves that are parts of parameters have the values of these."""
        for unit in self.units:
            unit.refresh_leaves()

    def spread_updates(self) -> None:
        """Lets the other ranks have the values that this one has updated."""
        for unit in self.units:
            unit.spread_updates(self.keeps_whole)

    def gradients(self) -> dict[nn.Parameter, Tensor | None]:
        """Returns the whole gradients after their reduction; every rank that holds the parameters takes part."""
        return {p: g for unit in self.units for p, g in unit.gradients().items()}

    # -- optimizer state ---------------------------------------------------------------------------------------------

    def take_states(self, optimizer: Optimizer) -> None:
        """Takes the states of parts out of an optimizer after training, for checkpoints that are saved later."""
        states = self.states(optimizer)
        self._left = {leaf: to_cpu(states[leaf]) for leaf in self.parameter_of if leaf in states}
        for leaf, parameter in self.parameter_of.items():
            if leaf is not parameter:
                optimizer.state.pop(leaf, None)

    def states(self, optimizer: Optimizer) -> Mapping[Any, Any]:
        """Returns the states of this rank's leaves, where they are."""
        return optimizer.state if self._left is None else self._left

    def part_of_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what this rank keeps of the optimizer state of a whole parameter."""
        segment = self._own[parameter]
        if segment.is_whole:
            return dict(state)
        return {
            key: segment.of(value).clone() if has_shape(value, self._shapes[parameter]) else value
            for key, value in state.items()
        }

    def own_states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns what this rank writes of the optimizer state into a checkpoint folder: nothing is gathered.

        The ranks that hold the stages write different parts. What a state has once for the whole parameter is written
        by the rank with its first part.
        """
        found = {}
        states = self.states(optimizer)
        for parameter, segment in self._own.items():
            leaf = self.leaves[parameter]
            state = states.get(leaf)
            if state is not None and not segment.is_whole:
                parts = {
                    key: Part(value.detach().reshape(-1), segment.start, self._shapes[parameter])
                    for key, value in state.items()
                    if has_shape(value, leaf.shape)
                }
                once = {key: value for key, value in state.items() if key not in parts and segment.start == 0}
                state = {**once, **parts}
            if state is not None:
                found[parameter] = state
        return found

    def own_parameters(self) -> dict[nn.Parameter, Part | None]:
        """Returns what this rank writes of parameters that are in shards: its part, or None."""
        units = [] if self.keeps_whole else [unit for unit in self.units if unit.releases]
        found: dict[nn.Parameter, Part | None] = {p: None for unit in units for p in unit.parameters}
        for unit in units:
            for parameter, segment in unit.own.items():
                values = self.leaves[parameter].detach().reshape(-1)
                found[parameter] = Part(values, segment.start, parameter.shape)
        return found

    def whole_states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns the optimizer state of whole parameters in host memory, on the first rank that holds them.

        Every rank that holds them takes part; the others get nothing.
        """
        holders = self._holders
        parts: list[Any] | None = [None] * len(holders.ranks) if holders.index == 0 else None
        with waiting(_GATHERING, holders.control_group):
            dist.gather_object(self._mine(optimizer), parts, holders.ranks[0], group=holders.control_group)
        return self._joined(parts or ())

    def states_everywhere(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns what :meth:`whole_states` returns, on every rank that holds the parameters."""
        parts: list[Any] = [None] * len(self._holders.ranks)
        with waiting(_GATHERING, self._holders.control_group):
            dist.all_gather_object(parts, self._mine(optimizer), group=self._holders.control_group)
        return self._joined(parts)

    def take_parts(self, optimizer: Optimizer, states: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Puts this rank's parts of changed states of whole parameters into an optimizer.

        Args:
            optimizer: The optimizer, which has states of these parts.
            states: The states of some parameters.
        """
        for parameter, state in states.items():
            if parameter in self._own:
                of_entries = {k: v for k, v in state.items() if has_shape(v, self._shapes[parameter])}
                optimizer.state[self.leaves[parameter]].update(self.part_of_state(parameter, of_entries))

    def _mine(self, optimizer: Optimizer) -> list[tuple[int, int, int, Any]]:
        """Returns for each own segment its parameter's index, its ends, and its state in host memory."""
        index, states = {p: i for i, p in enumerate(self._order)}, self.states(optimizer)
        return [
            (index[p], s.start, s.end, to_cpu(states[self.leaves[p]]))
            for p, s in self._own.items()
            if self.leaves[p] in states
        ]

    @property
    def _order(self) -> list[nn.Parameter]:
        return [p for unit in self.units for p in unit.parameters]

    def _joined(self, of_ranks: Sequence[Any]) -> dict[nn.Parameter, dict[str, Any]]:
        of_parameter: dict[int, list[Any]] = {}
        for i, *part in sorted((p for parts_of in of_ranks for p in parts_of), key=lambda p: p[:2]):
            of_parameter.setdefault(i, []).append(part)
        order = self._order
        return {order[i]: _joined(self._shapes[order[i]], found) for i, found in of_parameter.items()}


def _joined(shape: torch.Size, parts: Sequence[tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the state of a parameter from the states of its segments, which are in order."""
    first: dict[str, Any] = parts[0][2]
    if len(parts) == 1:
        return first
    whole = {}
    for key, value in first.items():
        if has_shape(value, torch.Size([parts[0][1] - parts[0][0]])):
            value = torch.cat([state[key] for _, _, state in parts]).view(shape)
        whole[key] = value
    return whole


def has_shape(value: Any, shape: torch.Size) -> bool:
    """Tells whether an entry of an optimizer's state is a tensor of a shape; single numbers are none."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def to_cpu(value: Any) -> Any:
    """Returns a state whose tensors are in host memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    return value
