"""Keeps experts on the ranks that own them: values, gradients and optimizer state of each expert are on one rank.

A parameter with an entry for each expert keeps its place in the module, and so its name in checkpoints and its place in
the optimizer. While training steps run it holds the entries of this rank's experts only. For checkpoints and at the end
of training it is whole on every rank. Where several ranks own the same experts, their optimizer state may be sharded
over these ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.expert_ranks import bounds_of
from lightning_januspipe.graph.exchange import send_rows_to_each
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.optimizer_shards import ELEMENT_WISE, OptimizerShards, has_shape, to_cpu
from lightning_januspipe.runtime.released import has_gradient_elsewhere

_GATHERING = "gathering of experts"
_MOVING = "moving of experts to other ranks"
_COPYING = "copying of experts to other ranks"
_SUMMING = "summing of gradients of copied experts"


class ExpertShards:
    """Holds this rank's entries of parameters with an entry for each expert, along their first dimension.

    Args:
        parameters: The parameters, whole, the same on all ranks that hold the stages.
        mesh: This rank's process groups, with those of experts.

    Attributes:
        parameters: See above.
        are_whole: Whether parameters have the entries of all experts now.
        optimizers: Those whose state moves with the experts.
        state_shards: How the ranks that own the same experts share the state of an optimizer, if they do.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
        self._mesh = mesh
        self._shapes = {p: p.shape for p in parameters}
        self._bounds = {p: bounds_of(p.shape[0], mesh.expert_size) for p in parameters}
        self._orders = {p: list(range(p.shape[0])) for p in parameters}  # experts, those of the first rank first
        self._gradients: dict[nn.Parameter, Tensor | None] = {}
        # during a step: positions of own entries that each rank holds too, and how many of each rank's this one holds
        self._guests: dict[nn.Parameter, tuple[list[list[int]], list[int]]] = {}
        self.optimizers: list[Optimizer] = []
        self.state_shards: dict[Optimizer, OptimizerShards] = {}
        self.parameters = list(parameters)
        self.are_whole = True

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._bounds

    @property
    def num_states(self) -> int:
        """Returns how many numbers optimizers keep for each number of a parameter, at most."""
        states = [state.values() for optimizer in self.optimizers for state in optimizer.state.values()]
        return max((sum(isinstance(v, Tensor) and v.dim() > 0 for v in values) for values in states), default=0)

    def keep_own(self) -> None:
        """Frees the entries of other ranks' experts; gradients that wait for the next micro-batches come back."""
        if not self.are_whole:
            return
        for parameter in self.parameters:
            has_gradient = not has_gradient_elsewhere(parameter)
            if has_gradient:
                parameter.grad = None
            parameter.data = self._own(parameter, parameter.data)
            if has_gradient:
                parameter.grad = self._gradients.pop(parameter, None)
        for shards in self.state_shards.values():
            shards.refresh_leaves()
        self.are_whole = False

    def make_whole(self) -> None:
        """Brings the entries of all experts to this rank; every rank that holds the stages takes part."""
        if self.are_whole:
            return
        for parameter in self.parameters:
            whole = self._gathered(parameter, parameter.data)
            if not has_gradient_elsewhere(parameter):
                self._gradients[parameter], parameter.grad = parameter.grad, None
            parameter.data = whole
        self.are_whole = True

    @contextmanager
    def own_shapes(self) -> Iterator[None]:
        """Gives parameters the entries of own experts inside, without their gradients."""
        values = [(p, p.data) for p in self.parameters] if self.are_whole else []
        for parameter, whole in values:
            parameter.data = self._own(parameter, whole)
        yield
        for parameter, whole in values:
            parameter.data = whole

    def reduce_gradients(self) -> None:
        """Sums ``.grad`` over the ranks that own the same experts, and averages it over replicas.

        Gradients whose parameters are in :attr:`state_shards` are left to these.
        """
        mesh = self._mesh
        in_shards = {p for shards in self.state_shards.values() for p in shards.parameters}
        every = [p for p in self.parameters if p not in in_shards]
        if mesh.expert_copies_group is not None:
            with waiting("reduction of gradients of experts", mesh.expert_copies_group, mixed=True):
                reduce_gradients(every, mesh.expert_copies_group)
        for parameter in every:
            if parameter.grad is not None:
                parameter.grad /= mesh.shape.data

    def gradients(self, of_own: Mapping[nn.Parameter, Tensor | None]) -> dict[nn.Parameter, Tensor | None]:
        """Returns the whole gradients of experts that are trained, after :meth:`reduce_gradients`.

        Every rank that holds the stages takes part.

        Args:
            of_own: The gradients of own entries.
        """
        found: dict[nn.Parameter, Tensor | None] = {}
        for parameter in (p for p in self.parameters if p.requires_grad):
            gradient = of_own.get(parameter)
            has = torch.tensor(float(gradient is not None), device=parameter.device)
            with waiting(_GATHERING, self._mesh.expert_group):
                dist.all_reduce(has, group=self._mesh.expert_group)
            own = torch.zeros_like(parameter) if gradient is None else gradient
            found[parameter] = self._gathered(parameter, own) if has else None
        return found

    def place(self, orders: Mapping[nn.Parameter, Sequence[int]]) -> None:
        """Moves entries, with their optimizer state and what is in ``.grad``, to the ranks that hold them from now on.

        Every rank that shares the experts takes part. No rank has more or fewer entries than before.

        Args:
            orders: The indices of the experts of some parameters, those that the first rank holds first.
        """
        assert not self.are_whole
        group = self._mesh.expert_group
        have_gradients = self._exist_on_any([p.grad for p in orders], _MOVING)
        states = {optimizer: self._own_states(optimizer) for optimizer in self.optimizers}
        for (parameter, order), has in zip(orders.items(), have_gradients, strict=True):
            moved = [parameter.data]
            for of_optimizer in states.values():
                moved += [v for v in of_optimizer.get(parameter, {}).values() if has_shape(v, parameter.shape)]
            if has:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                moved.append(parameter.grad)
            routes = self._routes(parameter, order)
            for tensor in moved:
                _move(tensor, *routes, group)
            self._orders[parameter] = list(order)
        for optimizer, of_optimizer in states.items():
            if optimizer in self.state_shards:
                of_moved = {p: state for p, state in of_optimizer.items() if p in orders}
                self.state_shards[optimizer].take_parts(optimizer, of_moved)

    def _own_states(self, optimizer: Optimizer) -> Mapping[Any, Mapping[str, Any]]:
        """Returns the optimizer state of own entries, gathered from the ranks that share it."""
        if optimizer not in self.state_shards:
            return optimizer.state
        found = self.state_shards[optimizer].states_everywhere(optimizer)
        return {p: {k: _on(v, p.device) for k, v in state.items()} for p, state in found.items()}

    def copy_guests(self, held: Mapping[nn.Parameter, Sequence[Sequence[int]]]) -> None:
        """Copies entries of other ranks' experts behind this rank's own ones, until :meth:`return_guests`.

        Every rank that shares the experts takes part. Gradients that wait for the next micro-batches are put aside.

        Args:
            held: For some parameters, for each rank the experts of other ranks that it holds too, in the order in
                which their owners hold them.
        """
        assert not self.are_whole and not self._guests
        group, rank = self._mesh.expert_group, self._mesh.expert_rank
        for parameter, experts in held.items():
            bounds, order = self._bounds[parameter], self._orders[parameter]
            of_owners = [set(order[a:b]) for a, b in pairwise(bounds)]
            own = {expert: i for i, expert in enumerate(order[bounds[rank] : bounds[rank + 1]])}
            sent = [[own[e] for e in of_rank if e in own] for of_rank in experts]
            received = [len(of_owner.intersection(experts[rank])) for of_owner in of_owners]
            rows = parameter.data[[position for of_rank in sent for position in of_rank]]
            into = rows.new_empty(sum(received), *rows.shape[1:])
            send_rows_to_each(into, rows, received, [len(s) for s in sent], group, _COPYING)
            self._gradients[parameter], parameter.grad = parameter.grad, None
            parameter.data = torch.cat([parameter.data, into])
            self._guests[parameter] = sent, received

    def return_guests(self, sums: GradientBuffers) -> None:
        """Adds the gradients of guests to those of their owners, in the order of ranks, and frees the guests.

        Every rank that shares the experts takes part.

        Args:
            sums: The parameter gradients of the step; afterwards they are those of own entries.
        """
        if not self._guests:
            return
        found = [sums.take(p) for p in self._guests]
        have_gradients = self._exist_on_any(found, _SUMMING)
        for (parameter, routes), total, has in zip(self._guests.items(), found, have_gradients, strict=True):
            if has:
                total = torch.zeros_like(parameter) if total is None else total
                sums.add([parameter], [_with_returned(total, *routes, self._mesh.expert_group)])
        self.drop_guests()

    def drop_guests(self) -> None:
        """Frees the entries of other ranks' experts that this rank holds during a step, without their gradients."""
        for parameter, (_, received) in self._guests.items():
            parameter.data = parameter.data[: len(parameter) - sum(received)].clone()
            parameter.grad = self._gradients.pop(parameter, None)
        self._guests = {}

    def _exist_on_any(self, gradients: Sequence[Tensor | None], what: str) -> list[bool]:
        """Returns for each gradient whether any rank that shares the experts has one."""
        exist = torch.tensor([float(g is not None) for g in gradients], device=self._mesh.device)
        with waiting(what, self._mesh.expert_group):
            dist.all_reduce(exist, op=dist.ReduceOp.MAX, group=self._mesh.expert_group)
        return [value > 0 for value in exist.tolist()]

    def _routes(self, parameter: nn.Parameter, after: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Returns for each rank the positions of own entries that go there, and the new positions of those from there.

        Args:
            parameter: The parameter.
            after: Its experts in their new order.
        """
        before, bounds, rank = self._orders[parameter], self._bounds[parameter], self._mesh.expert_rank
        ranks = list(pairwise(bounds))
        mine_before, mine_after = (order[bounds[rank] : bounds[rank + 1]] for order in (before, after))
        sent = [[mine_before.index(e) for e in after[a:b] if e in mine_before] for a, b in ranks]
        received = [[i for i, e in enumerate(mine_after) if e in before[a:b]] for a, b in ranks]
        return sent, received

    def _own(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        bounds, rank = self._bounds[parameter], self._mesh.expert_rank
        return values[self._orders[parameter][bounds[rank] : bounds[rank + 1]]]

    def _in_order(self, parameter: nn.Parameter, parts: Sequence[Tensor]) -> Tensor:
        """Returns the entries of all experts, the first expert first, from those of each rank."""
        joined = torch.cat(list(parts))
        return torch.empty_like(joined).index_copy_(
            0, torch.tensor(self._orders[parameter], device=joined.device), joined
        )

    def _gathered(self, parameter: nn.Parameter, own: Tensor) -> Tensor:
        """Returns the entries of all ranks: each sends as many as the rank with the most has."""
        bounds = self._bounds[parameter]
        counts = [end - begin for begin, end in pairwise(bounds)]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own.detach()
        found = [torch.empty_like(padded) for _ in counts]
        with waiting(_GATHERING, self._mesh.expert_group):
            dist.all_gather(found, padded, group=self._mesh.expert_group)
        return self._in_order(parameter, [part[:count] for part, count in zip(found, counts, strict=True)])

    # -- optimizer state ---------------------------------------------------------------------------------------------

    def part_of_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what this rank keeps of the optimizer state of a whole parameter."""
        whole = self._shapes[parameter]
        return {k: self._own(parameter, v) if has_shape(v, whole) else v for k, v in state.items()}

    def whole_states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns the optimizer state of whole parameters in host memory; every rank that holds the stages takes part.

        Only the first rank that holds the stages gets it.
        """
        found = {}
        group, shards = self._mesh.expert_control_group, self.state_shards.get(optimizer)
        # Of the ranks that share a state, the first has it all; the others bring nothing.
        states: Mapping[Any, Any] = optimizer.state if shards is None else shards.whole_states(optimizer)
        for parameter in self.parameters:
            mine = to_cpu(dict(states[parameter])) if parameter in states else None
            parts: list[Any] | None = [None] * self._mesh.expert_size if self._mesh.expert_rank == 0 else None
            with waiting("gathering of optimizer states of experts", group):
                dist.gather_object(mine, parts, self._mesh.expert_ranks[0], group=group)
            if parts is not None and parts[0] is not None and self._mesh.stage_rank == 0:
                assert None not in parts, "an expert has no optimizer state on its rank"
                found[parameter] = self._joined(parameter, parts)
        return found

    def _joined(self, parameter: nn.Parameter, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        bounds, rest = self._bounds[parameter], self._shapes[parameter][1:]
        own = torch.Size([bounds[1] - bounds[0], *rest])
        return {
            k: self._in_order(parameter, [p[k] for p in parts]) if has_shape(v, own) else v for k, v in parts[0].items()
        }


def _move(
    values: Tensor, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], group: dist.ProcessGroup | None
) -> None:
    """Sends entries to other ranks and takes those of other ranks, in place; see :meth:`ExpertShards._routes`."""
    rows = values[[position for of_rank in sent for position in of_rank]]
    into = torch.empty_like(values)
    send_rows_to_each(into, rows, [len(r) for r in received], [len(s) for s in sent], group, _MOVING)
    values[[position for of_rank in received for position in of_rank]] = into


def _with_returned(
    gradient: Tensor, sent: Sequence[Sequence[int]], received: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Returns the gradient of own entries, with what other ranks computed of it.

    Args:
        gradient: that of own entries, and behind it that of this rank's guests.
        sent: for each rank, the positions of own entries that are its guests.
        received: how many guests of this rank are of each rank.
        group: the ranks.
    """
    num_own = len(gradient) - sum(received)
    own, rows = gradient[:num_own].clone(), gradient[num_own:]
    counts = [len(positions) for positions in sent]
    into = rows.new_empty(sum(counts), *rows.shape[1:])
    send_rows_to_each(into, rows, counts, received, group, _SUMMING)
    for positions, part in zip(sent, into.split(counts), strict=True):
        own[positions] += part  # a rank has at most one copy of an expert, so no position is there twice
    return own


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.dim() else value


def require_element_wise(optimizer: Optimizer) -> None:
    """Refuses optimizers that combine entries of a parameter: each rank has the entries of its own experts only.

    Raises:
        ValueError: The optimizer is none of those that update each entry by itself.
    """
    if type(optimizer) not in ELEMENT_WISE:
        names = ", ".join(kind.__name__ for kind in ELEMENT_WISE)
        raise ValueError(
            f"expert_size > 1 needs an optimizer that updates each entry by itself, but {type(optimizer).__name__} may "
            f"not. Use one of {names}, or expert_size=1."
        )
