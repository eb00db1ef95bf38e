"""Shards optimizer state: of the ranks that hold the same stage, each updates a part of the stage's parameters.

These ranks are the D replicas times the G graph ranks of a stage. Their gradients are summed by a reduce-scatter, so
that each rank gets the part that it updates; after the optimizer's step the updated values are gathered. Both together
send the bytes of one all-reduce. Parameters stay whole on every rank.

FSDP cannot do this for forces: its hooks break where a backward pass is differentiated again. Here all phases have run
before gradients are reduced, so the sums are exact. (Janus, arXiv 2604.15821, shards the state of its ranks too.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import Mesh

ELEMENT_WISE: tuple[type[Optimizer], ...] = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop, torch.optim.RMSprop),
    *(torch.optim.Adagrad, torch.optim.Adadelta),
)
"""Optimizers that update each entry of a parameter by itself, so that a shard may begin and end inside of one."""

# Older releases of torch have these collectives under other names only.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCTION = "reduction of gradients over replicas and graph ranks"
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Segment:
    """Names the entries ``start`` to ``end`` of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        """Tells whether these are all entries of the parameter."""
        return self.end - self.start == self.parameter.numel()

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these entries of a tensor with the parameter's shape, as a flat tensor."""
        return tensor.detach().reshape(-1)[self.start : self.end]


def segments(parameters: Sequence[nn.Parameter], num_shards: int, may_cut: bool) -> list[list[Segment]]:
    """Returns the segments of each shard: parameters one after the other, in shards of about equal length.

    Args:
        parameters: Parameters, in the order in which shards take them.
        num_shards: Number of shards.
        may_cut: Whether a shard may begin and end inside of a parameter, unless its memory is not contiguous.
    """
    ends = list(itertools.accumulate((p.numel() for p in parameters), initial=0))
    bounds = [ends[-1] * shard // num_shards for shard in range(num_shards + 1)]
    found: list[list[Segment]] = [[] for _ in range(num_shards)]
    for parameter, start, end in zip(parameters, ends, ends[1:], strict=False):
        if not (may_cut and parameter.is_contiguous()):
            bounds = [_nearest(bound, start, end) if start < bound < end else bound for bound in bounds]
        for shard, (first, last) in enumerate(itertools.pairwise(bounds)):
            low, high = max(first, start), min(last, end)
            if low < high:
                found[shard].append(Segment(parameter, low - start, high - start))
    return found


def _nearest(bound: int, start: int, end: int) -> int:
    return start if bound - start < end - bound else end


class OptimizerShards:
    """Holds the shards of one optimizer's parameters.

    Every rank that holds the stage makes it with the same parameters, in the same order.

    Args:
        parameters: The parameters of the optimizer that this rank's stages train.
        optimizer: The optimizer; if it is none of :data:`ELEMENT_WISE`, a parameter is never cut, which is exact for
            every optimizer that treats parameters one by one.
        mesh: This rank's process groups.

    Attributes:
        own: This rank's segment of a parameter, if it has one.
        leaves: What this rank's optimizer updates for each parameter: the parameter itself, or a flat view of a part.
        parameter_of: The parameter of each leaf.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer, mesh: Mesh) -> None:
        self._mesh, self._group = mesh, mesh.stage_group
        self._size, rank = mesh.shape.data * mesh.shape.graph, mesh.stage_rank
        may_cut = type(optimizer) in ELEMENT_WISE
        same: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            same.setdefault(parameter.dtype, []).append(parameter)
        self._shards = [segments(p, self._size, may_cut) for p in same.values()]
        self.own = {s.parameter: s for shards in self._shards for s in shards[rank]}
        self.leaves = {p: p if s.is_whole else nn.Parameter(s.of(p), p.requires_grad) for p, s in self.own.items()}
        self.parameter_of = {leaf: p for p, leaf in self.leaves.items()}

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Returns the parameters of all shards."""
        return {s.parameter for shards in self._shards for shard in shards for s in shard}

    def reduce_gradients(self) -> None:
        """Sums ``.grad`` over graph ranks, averages it over replicas, and leaves this rank's part in its leaves.

        A parameter without a gradient on any rank gets none. ``.grad`` of the parameters themselves is forgotten.
        """
        for shards in self._shards:
            every = [s for shard in shards for s in shard]
            device = every[0].parameter.device
            present = torch.tensor([s.parameter.grad is not None for s in every], dtype=torch.float32, device=device)
            with waiting(_REDUCTION, self._group):
                dist.all_reduce(present, group=self._group)
            used = {s.parameter: n > 0 for s, n in zip(every, present.tolist(), strict=True)}
            mine = self._scattered(shards, lambda s: None if s.parameter.grad is None else s.of(s.parameter.grad))
            for segment in every:
                segment.parameter.grad = None
            for segment, values in mine:
                leaf = self.leaves[segment.parameter]
                if not segment.is_whole:
                    leaf.data = segment.of(segment.parameter)  # a parameter may have been given other memory
                is_used = used[segment.parameter]
                leaf.grad = (values / self._mesh.shape.data).view_as(leaf) if is_used else None

    def _scattered(
        self, shards: Sequence[Sequence[Segment]], value: Callable[[Segment], Tensor | None]
    ) -> list[tuple[Segment, Tensor]]:
        """Returns this rank's segments, each with the sum of all ranks' values; None counts as zeros."""
        length = _longest(shards)
        like = next(s.parameter for shard in shards for s in shard)
        sent = torch.zeros(self._size, length, dtype=like.dtype, device=like.device)
        for row, shard in zip(sent, shards, strict=True):
            for segment, part in zip(shard, row.split(_lengths(shard, length)), strict=False):
                found = value(segment)
                if found is not None:
                    part.copy_(found)
        mine = torch.empty(length, dtype=like.dtype, device=like.device)
        with waiting(_REDUCTION, self._group):
            _reduce_scatter(mine, sent.view(-1), group=self._group)
        shard = shards[self._mesh.stage_rank]
        return list(zip(shard, mine.split(_lengths(shard, length)), strict=False))

    def gather(self) -> None:
        """Gives every rank the values that the other ranks have updated."""
        for shards in self._shards:
            for segment, values in self._gathered(shards, lambda s: s.of(s.parameter)):
                segment.of(segment.parameter.data).copy_(values)

    def gradients(self) -> dict[nn.Parameter, Tensor | None]:
        """Returns the whole gradients after :meth:`reduce_gradients`; every rank that holds the stage takes part."""
        found: dict[nn.Parameter, Tensor | None] = dict.fromkeys(self.parameters)
        for shards in self._shards:
            parts = self._gathered(shards, lambda s: self._gradient(s)[0])
            has = self._gathered(shards, lambda s: self._gradient(s)[1])
            for (segment, values), (_, present) in zip(parts, has, strict=True):
                if not present.any():
                    continue
                gradient = found[segment.parameter]
                if gradient is None:
                    gradient = found[segment.parameter] = torch.zeros_like(segment.parameter)
                segment.of(gradient).copy_(values)
        return found

    def _gradient(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Returns a flat gradient, zeros if there is none, and ones if there is one."""
        leaf = self.leaves[segment.parameter]
        zeros = torch.zeros(segment.end - segment.start, dtype=leaf.dtype, device=leaf.device)
        return (zeros, zeros) if leaf.grad is None else (leaf.grad.reshape(-1), zeros + 1)

    def _gathered(
        self, shards: Sequence[Sequence[Segment]], value: Callable[[Segment], Tensor]
    ) -> list[tuple[Segment, Tensor]]:
        """Returns the segments of all ranks with their values."""
        length = _longest(shards)
        like = next(s.parameter for shard in shards for s in shard)
        mine = torch.zeros(length, dtype=like.dtype, device=like.device)
        shard = shards[self._mesh.stage_rank]
        for segment, part in zip(shard, mine.split(_lengths(shard, length)), strict=False):
            part.copy_(value(segment))
        found = mine.new_empty(self._size * length)
        with waiting("gathering of sharded parameters", self._group):
            _all_gather(found, mine, group=self._group)
        return [
            pair
            for shard, row in zip(shards, found.view(self._size, length), strict=True)
            for pair in zip(shard, row.split(_lengths(shard, length)), strict=False)
        ]

    # -- optimizer state ---------------------------------------------------------------------------------------------

    def part_of_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what this rank keeps of the optimizer state of a whole parameter."""
        segment = self.own[parameter]
        if segment.is_whole:
            return dict(state)
        return {
            key: segment.of(value).clone() if _is_like(value, parameter.shape) else value
            for key, value in state.items()
        }

    def whole_states(self, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
        """Returns the optimizer state of whole parameters in host memory, on the first rank that holds the stage.

        Every rank that holds the stage takes part; the others get nothing.
        """
        order = [s.parameter for shards in self._shards for shard in shards for s in shard]
        index = {p: i for i, p in enumerate(order)}
        mine = [
            (index[p], s.start, s.end, to_cpu(optimizer.state[self.leaves[p]]))
            for p, s in self.own.items()
            if self.leaves[p] in optimizer.state
        ]
        is_first = self._mesh.stage_rank == 0
        parts: list[Any] | None = [None] * self._size if is_first else None
        with waiting("gathering of sharded optimizer states", self._mesh.stage_control_group):
            dist.gather_object(mine, parts, self._mesh.stage_ranks[0], group=self._mesh.stage_control_group)
        of_parameter: dict[int, list[Any]] = {}
        for i, *part in sorted((p for parts_of in parts or () for p in parts_of), key=lambda p: p[:2]):
            of_parameter.setdefault(i, []).append(part)
        return {order[i]: _joined(order[i], found) for i, found in of_parameter.items()}


def _joined(parameter: nn.Parameter, parts: Sequence[tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the state of a parameter from the states of its segments, which are in order."""
    first: dict[str, Any] = parts[0][2]
    if len(parts) == 1:
        return first
    whole = {}
    for key, value in first.items():
        if _is_like(value, torch.Size([parts[0][1] - parts[0][0]])):
            value = torch.cat([state[key] for _, _, state in parts]).view(parameter.shape)
        whole[key] = value
    return whole


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def _longest(shards: Sequence[Sequence[Segment]]) -> int:
    return max(sum(s.end - s.start for s in shard) for shard in shards)


def _lengths(shard: Sequence[Segment], length: int) -> list[int]:
    """Returns the lengths of a shard's segments, and of the padding."""
    lengths = [s.end - s.start for s in shard]
    return [*lengths, length - sum(lengths)]


def to_cpu(value: Any) -> Any:
    """Returns a state whose tensors are in host memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    return value
