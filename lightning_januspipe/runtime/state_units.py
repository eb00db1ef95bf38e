"""Holds the sharded state of single stages: which rank has which entries, and the collectives that join them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import Holders
from lightning_januspipe.runtime.released import hide, show

# Older releases of torch have these collectives under other names only.
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCTION = "reduction of gradients over replicas and graph ranks"
_GATHERING = "gathering of sharded parameters"


@dataclass(frozen=True)
class Segment:
    """Names the entries ``start`` to ``end`` of a flattened parameter that has ``size`` entries in all."""

    parameter: nn.Parameter
    start: int
    end: int
    size: int

    @property
    def is_whole(self) -> bool:
        """Tells whether these are all entries of the parameter."""
        return self.end - self.start == self.size

    @property
    def length(self) -> int:
        """Returns the number of entries."""
        return self.end - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Returns these entries of a tensor with the parameter's shape, as a flat tensor."""
        return tensor.detach().reshape(-1)[self.start : self.end]


def segments(parameters: Sequence[nn.Parameter], num_shards: int, may_cut: bool) -> list[list[Segment]]:
    """Returns the segments of each shard: parameters one after the other, in shards of about equal length.

    Args:
        parameters: Parameters, in the order in which shards take them.
        num_shards: Number of shards.
        may_cut: Whether a shard may begin and end inside of a parameter, unless its memory is not contiguous. If all
            may be cut, all shards but the last ones have one length.
    """
    ends = list(itertools.accumulate((p.numel() for p in parameters), initial=0))
    length = -(-ends[-1] // num_shards)
    bounds = [min(ends[-1], length * shard) for shard in range(num_shards + 1)]
    found: list[list[Segment]] = [[] for _ in range(num_shards)]
    for parameter, start, end in zip(parameters, ends, ends[1:], strict=False):
        if not (may_cut and parameter.is_contiguous()):
            bounds = [_nearest(bound, start, end) if start < bound < end else bound for bound in bounds]
        for shard, (first, last) in enumerate(itertools.pairwise(bounds)):
            low, high = max(first, start), min(last, end)
            if low < high:
                found[shard].append(Segment(parameter, low - start, high - start, end - start))
    return found


def _nearest(bound: int, start: int, end: int) -> int:
    return start if bound - start < end - bound else end


class _FlatMemory:
    """Keeps parameters as views of one buffer, which can be released and gathered again.

    Tensors that share the memory of a parameter, such as those that autograd has saved, stay right: the memory comes
    back at the place where they look for it.

    Args:
        shards: The segments of each rank. Parameters that are cut lie in shards of one length.
        rank: The index of this rank's shard.
        names: Names of the parameters.

    Attributes:
        own: This rank's shard, which stays.
        work: The gathering that is under way.
        is_there: Whether the parameters have their values.
    """

    def __init__(self, shards: Sequence[Sequence[Segment]], rank: int, names: Mapping[nn.Parameter, str]) -> None:
        self._length, like = _longest(shards), _first(shards)
        self._whole = torch.zeros(len(shards) * self._length, dtype=like.dtype, device=like.device)
        self._num_bytes = self._whole.untyped_storage().nbytes()
        self._names: dict[nn.Parameter, str] = {}
        places: dict[nn.Parameter, int] = {}
        for row, shard in zip(self._whole.view(len(shards), -1), shards, strict=True):
            for segment, part in zip(shard, row.split(_lengths(shard, self._length)), strict=False):
                part.copy_(segment.of(segment.parameter))
                places.setdefault(segment.parameter, part.storage_offset())
        for parameter, place in places.items():
            parameter.data = self._whole[place : place + parameter.numel()].view(parameter.shape)
            self._names[parameter] = names.get(parameter, "a parameter")
        self._rank = rank
        self.own = self._own_part().clone()
        self.work: Any = None
        self.is_there = True

    def _own_part(self) -> Tensor:
        return self._whole[self._rank * self._length : (self._rank + 1) * self._length]

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is a view of the gathered parameters."""
        return tensor.untyped_storage()._cdata == self._whole.untyped_storage()._cdata

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Starts to gather the parameters, unless they are there; then it takes in what others have written to them."""
        if self.is_there:
            self.own.copy_(self._own_part())
        elif self.work is None:
            self._whole.untyped_storage().resize_(self._num_bytes)
            with waiting(_GATHERING, group):
                self.work = all_gather(self._whole, self.own, group=group, async_op=True)

    def wait(self, group: dist.ProcessGroup | None) -> None:
        """Waits for the gathering that was started, if any."""
        if self.work is None:
            return
        with waiting(_GATHERING, group):
            self.work.wait()
        self.work, self.is_there = None, True
        for parameter in self._names:
            show(parameter)

    def release(self) -> None:
        """Frees the memory of the parameters, apart from this rank's shard."""
        assert self.work is None, "parameters are released after they have come"
        if self.is_there:
            self.own.copy_(self._own_part())
            self.drop()

    def drop(self) -> None:
        """Frees the memory of parameters whose shards have newer values."""
        if self.is_there:
            self.is_there = False
            self._whole.untyped_storage().resize_(0)
            for parameter, name in self._names.items():
                hide(parameter, name)

    def dissolve(self) -> bool:
        """Gives each parameter memory of its own, if the parameters are there; returns whether they are."""
        if self.is_there:
            for parameter in self._names:
                parameter.data = parameter.data.clone()
        return self.is_there


class StateUnit:
    """Shards the state of parameters of one stage, of one dtype and one optimizer, over the ranks that hold them.

    All of these ranks make it with the same parameters, and call its methods in the same order.

    Args:
        parameters: The parameters, in one order on all ranks.
        stage: The stage that reads them; None for parameters that several stages or the user's step read.
        holders: The ranks that hold the parameters.
        may_cut: Whether the optimizer may update a part of a parameter.
        releases: Whether the parameters themselves are in shards too, and their memory is released between steps.
        names: Names of the parameters, for errors.

    Attributes:
        stage, releases: See above.
        shards: The segments of each rank.
        own: This rank's segment of a parameter, if it has one.
        leaves: What this rank's optimizer updates for each parameter: the parameter itself, or a tensor with its part.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        stage: int | None,
        holders: Holders,
        may_cut: bool,
        releases: bool = False,
        names: Mapping[nn.Parameter, str] | None = None,
    ) -> None:
        self.stage, self.releases, self._group = stage, releases, holders.group
        self._size, self._rank = len(holders.ranks), holders.index
        self._shapes = {p: p.shape for p in parameters}  # experts are in other shapes at times
        if releases:
            for parameter in parameters:
                parameter.data = parameter.data.contiguous()
        self.shards = segments(parameters, self._size, may_cut)
        mine = self.shards[self._rank]
        self.own = {s.parameter: s for s in mine}
        self._memory: _FlatMemory | None = None
        if releases and self.parameters:
            memory = self._memory = _FlatMemory(self.shards, self._rank, names or {})
            parts = zip(mine, memory.own.split(_lengths(mine, memory.own.numel())), strict=False)
            self.leaves = {
                s.parameter: nn.Parameter(v.view(s.parameter.shape) if s.is_whole else v, s.parameter.requires_grad)
                for s, v in parts
            }
        else:
            self.leaves = {p: p if s.is_whole else nn.Parameter(s.of(p), p.requires_grad) for p, s in self.own.items()}
        self._sent: Tensor | None = None
        self._reduced: Tensor | None = None
        self._work: Any = None

    @property
    def gathering(self) -> list[Any]:
        """Returns the gathering that is under way, if any."""
        return [] if self._memory is None or self._memory.work is None else [self._memory.work]

    @property
    def reduction(self) -> list[Any]:
        """Returns the reduction that is under way, if any."""
        return [] if self._work is None else [self._work]

    @property
    def reduced_tensors(self) -> list[Tensor]:
        """Returns the gradients of the reduction that is under way."""
        return [t for t in (self._sent, self._reduced) if t is not None]

    @property
    def num_ranks(self) -> int:
        """Returns the number of shards."""
        return self._size

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all shards."""
        return list(dict.fromkeys(s.parameter for shard in self.shards for s in shard))

    # -- parameters ----------------------------------------------------------------------------------------------------

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether a tensor shares memory that may be released."""
        return self._memory is not None and self._memory.holds(tensor)

    def start_gathering(self) -> None:
        """Starts to gather parameters that were released."""
        if self._memory is not None:
            self._memory.start(self._group)

    def wait_for_parameters(self) -> None:
        """Waits until all parameters are there."""
        if self._memory is not None:
            self._memory.wait(self._group)

    def release(self) -> None:
        """Releases the parameters, if they are in shards."""
        if self._memory is not None:
            self._memory.release()

    def dissolve(self) -> bool:
        """Ends the sharding of parameters; returns whether they are there, which they may not be after an error."""
        return self._memory is None or self._memory.dissolve()

    def spread_updates(self, keep: bool) -> None:
        """Lets the other ranks have the values that this one has updated: now, or when they are gathered.

        Args:
            keep: Whether parameters in shards have to be there between steps.
        """
        if self._memory is None:
            for segment, values in self._gathered(lambda s: self.leaves[s.parameter].detach().reshape(-1)):
                segment.of(segment.parameter.data).copy_(values)
            return
        self._memory.drop()
        if keep:
            self._memory.start(self._group)
            self._memory.wait(self._group)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def start_reduction(self, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Starts to sum gradients over the ranks, unless that was started; each rank gets its shard.

        Args:
            gradient: Returns this rank's gradient of a parameter, None if it has none.
        """
        if self._work is not None or not self.parameters:
            return
        length, like = _longest(self.shards), _first(self.shards)
        # Behind the values of a shard stand counts of the ranks that have a gradient, one for each segment.
        width = length + max(map(len, self.shards))
        sent = torch.zeros(self._size, width, dtype=like.dtype, device=like.device)
        found = {p: gradient(p) for p in self.parameters}
        for row, shard in zip(sent, self.shards, strict=True):
            for index, (segment, part) in enumerate(self._parts(row, shard)):
                value = found[segment.parameter]
                if value is not None:
                    part.copy_(segment.of(value))
                    row[length + index] = 1
        self._sent, self._reduced = sent, sent.new_empty(width)
        with waiting(_REDUCTION, self._group):
            self._work = reduce_scatter(self._reduced, sent.view(-1), group=self._group, async_op=True)

    def local_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields what this rank has contributed to the reduction that is under way."""
        if self._sent is not None:
            for row, shard in zip(self._sent, self.shards, strict=True):
                for segment, part in self._parts(row, shard):
                    yield segment.parameter, part

    def finish_reduction(self, scale: float) -> None:
        """Waits for the sums, and leaves this rank's part, times ``scale``, in the gradients of its leaves.

        A parameter without a gradient on any rank gets none.
        """
        if self._work is None:
            return
        with waiting(_REDUCTION, self._group):
            self._work.wait()
        assert self._reduced is not None
        shard = self.shards[self._rank]
        values, counts = self._reduced.split([length := _longest(self.shards), self._reduced.numel() - length])
        values.mul_(scale)
        self.refresh_leaves()
        for (segment, part), count in zip(self._parts(values, shard), counts.tolist(), strict=False):
            leaf = self.leaves[segment.parameter]
            leaf.grad = part.view_as(leaf) if count > 0 else None
        self._sent = self._reduced = self._work = None

    def refresh_leaves(self) -> None:
        """Lets leaves that are parts of parameters have the values of these, which may have been given other memory."""
        for parameter, segment in self.own.items():
            if self._memory is None and not segment.is_whole:
                self.leaves[parameter].data = segment.of(parameter)

    @staticmethod
    def _parts(row: Tensor, shard: Sequence[Segment]) -> list[tuple[Segment, Tensor]]:
        return list(zip(shard, row.split(_lengths(shard, row.numel())), strict=False))

    def gradients(self) -> dict[nn.Parameter, Tensor | None]:
        """Returns the whole gradients after :meth:`finish_reduction`; every rank that holds the stage takes part."""
        found: dict[nn.Parameter, Tensor | None] = dict.fromkeys(self.parameters)
        if not found:
            return found
        parts = self._gathered(lambda s: self._gradient(s)[0])
        has = self._gathered(lambda s: self._gradient(s)[1])
        for (segment, values), (_, present) in zip(parts, has, strict=True):
            if not present.any():
                continue
            parameter = segment.parameter
            gradient = found[parameter]
            if gradient is None:
                gradient = found[parameter] = values.new_zeros(self._shapes[parameter])
            segment.of(gradient).copy_(values)
        return found

    def _gradient(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Returns a flat gradient, zeros if there is none, and ones if there is one."""
        leaf = self.leaves[segment.parameter]
        zeros = torch.zeros(segment.length, dtype=leaf.dtype, device=leaf.device)
        return (zeros, zeros) if leaf.grad is None else (leaf.grad.reshape(-1), zeros + 1)

    def _gathered(self, value: Callable[[Segment], Tensor]) -> list[tuple[Segment, Tensor]]:
        """Returns the segments of all ranks with their values."""
        if not self.parameters:
            return []
        length, like = _longest(self.shards), _first(self.shards)
        mine = torch.zeros(length, dtype=like.dtype, device=like.device)
        for segment, part in self._parts(mine, self.shards[self._rank]):
            part.copy_(value(segment))
        found = mine.new_empty(self._size * length)
        with waiting(_GATHERING, self._group):
            all_gather(found, mine, group=self._group)
        rows = zip(self.shards, found.view(self._size, length), strict=True)
        return [pair for shard, row in rows for pair in self._parts(row, shard)]


def _longest(shards: Sequence[Sequence[Segment]]) -> int:
    return max(sum(s.length for s in shard) for shard in shards)


def _first(shards: Sequence[Sequence[Segment]]) -> nn.Parameter:
    return next(s.parameter for shard in shards for s in shard)


def _lengths(shard: Sequence[Segment], length: int) -> list[int]:
    """Returns the lengths of a shard's segments, and of the padding."""
    lengths = [s.length for s in shard]
    return [*lengths, length - sum(lengths)]
