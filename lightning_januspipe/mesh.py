"""Computes the mesh of pipeline × data × graph ranks that a user asks for, and makes the process groups of one rank."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_januspipe.distributed import forget_notes, set_timeout, waiting

AXES = ("pp", "dp", "gp")
_T = TypeVar("_T")
Size = int | Literal["auto"]


@dataclass(frozen=True)
class MeshShape:
    """Holds the sizes of the three axes. Graph is innermost, so that its ranks are neighbours.

    Attributes:
        pipeline: Ranks of a pipeline, P.
        data: Replicas, D.
        graph: Ranks that share the atoms of a micro-batch, G.
    """

    pipeline: int
    data: int
    graph: int = 1

    @classmethod
    def resolve(cls, pipeline: Size, data: Size, graph: int, world_size: int) -> MeshShape:
        """Finds the sizes for a number of processes.

        Args:
            pipeline: Size, or "auto" for the world size over data × graph.
            data: Size, or "auto" for 1 if pipeline is "auto" too, else for what is left.
            graph: Size.
            world_size: The number of processes.

        Raises:
            ValueError: The product of the sizes is not the world size.
        """
        for name, size in (("pipeline_size", pipeline), ("data_size", data), ("graph_size", graph)):
            is_number = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            if not is_number and (size != "auto" or name == "graph_size"):
                raise ValueError(f"{name}={size!r}; expected a positive number" + (" or 'auto'" * (name[0] != "g")))
        num_data = (1 if pipeline == "auto" else max(world_size // (pipeline * graph), 1)) if data == "auto" else data
        num_pipeline = max(world_size // (num_data * graph), 1) if pipeline == "auto" else pipeline
        if num_pipeline * num_data * graph != world_size:
            raise ValueError(
                f"pipeline_size × data_size × graph_size = {num_pipeline} × {num_data} × {graph} = "
                f"{num_pipeline * num_data * graph}, but there are {world_size} processes (asked for: "
                f"pipeline_size={pipeline!r}, data_size={data!r}, graph_size={graph}). Change the sizes, or "
                "Trainer(devices=..., num_nodes=...), so that they agree."
            )
        return cls(num_pipeline, num_data, graph)

    @property
    def size(self) -> int:
        """Returns the number of processes."""
        return self.pipeline * self.data * self.graph

    @property
    def ranks_per_replica(self) -> int:
        """Returns the number of ranks that work on the same samples: those of a pipeline, with their graph ranks."""
        return self.pipeline * self.graph

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Returns the indices (pipeline, data, graph) of a global rank."""
        return rank // (self.data * self.graph), rank // self.graph % self.data, rank % self.graph

    def rank(self, pipeline: int, data: int, graph: int) -> int:
        """Returns the global rank with these indices."""
        return (pipeline * self.data + data) * self.graph + graph


@dataclass(frozen=True)
class Holders:
    """Names the ranks that hold the same parameters.

    Attributes:
        ranks: these ranks in order, by global rank.
        index: index of this rank among them.
        group: their process group.
        control_group: the same ranks, on the host.
    """

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    control_group: dist.ProcessGroup | None


class Mesh:
    """Holds the process groups of one rank. In one process there are none.

    Args:
        shape: Sizes of the axes.
        rank: Global rank.
        device: This rank's device.
        timeout: How long a rank waits for other ranks, in messages and collectives.

    Attributes:
        pipeline_rank: Index of this rank in its pipeline; data_rank and graph_rank are its other two indices.
        device_mesh: The axes "pp", "dp" and "gp" as torch has them.
        aborted: Whether an error has closed this rank's connections.
        down_group: The ranks of the pipeline, for messages to higher ranks; up_group, for messages to lower ones.
        control_group: The ranks of the pipeline, on the host.
        pipeline_group: The ranks of the pipeline.
        data_group: The ranks with the same stages in all replicas.
        graph_group: The ranks that share the atoms of this rank's micro-batches.
        replica_group: All ranks that work on this rank's samples, on the host.
        host_group: All ranks, on the host.
        stage_group: The ranks that hold the same stages, after :meth:`join_stage_ranks`; stage_control_group has the
            same ones, on the host.
        expert_size: Number of ranks that share the experts of this rank's stages, after :meth:`join_expert_ranks`.
        expert_rank: Index of this rank among them.
        expert_group: These ranks; expert_control_group has the same ones, on the host.
        expert_copies_group: The ranks that hold the same experts as this rank; None if no other rank does.
            expert_copies_control_group has the same ones, on the host.
        alone_group: This rank alone.
    """

    def __init__(self, shape: MeshShape, rank: int, device: torch.device, timeout: timedelta | None = None) -> None:
        self.shape, self.rank, self.device, self.timeout = shape, rank, device, timeout
        self.pipeline_rank, self.data_rank, self.graph_rank = shape.coordinates(rank)
        self.device_mesh: DeviceMesh | None = None
        self.aborted = False
        self.down_group = self.up_group = self.control_group = self.alone_group = None
        self.replica_group: dist.ProcessGroup | None = None
        self.graph_group: dist.ProcessGroup | None = None
        self.pipeline_group: dist.ProcessGroup | None = None
        self.data_group: dist.ProcessGroup | None = None
        self.stage_group: dist.ProcessGroup | None = None
        self.stage_control_group: dist.ProcessGroup | None = None
        self.host_group: dist.ProcessGroup | None = None
        self.expert_size, self.expert_rank = 1, 0
        self.expert_group: dist.ProcessGroup | None = None
        self.expert_control_group: dist.ProcessGroup | None = None
        self.expert_copies_group: dist.ProcessGroup | None = None
        self.expert_copies_control_group: dist.ProcessGroup | None = None
        self._made: list[dist.ProcessGroup] = []
        if shape.size == 1:
            return
        # Groups hold threads and sockets until they are destroyed, also where nobody has them any more.
        weakref.finalize(self, _destroy, self._made).atexit = False
        forget_notes(rank)
        self.device_mesh = init_device_mesh(device.type, (shape.pipeline, shape.data, shape.graph), mesh_dim_names=AXES)
        of_axes = [self.device_mesh[axis].get_group() for axis in AXES]
        self._made += [group for group in of_axes if group is not dist.group.WORLD]
        if timeout is not None:
            set_timeout(timeout, [None, *of_axes])
        # Every rank takes part in the creation of every group, in the same order.
        self.host_group = dist.new_group(backend="gloo", timeout=timeout)
        self._made.append(self.host_group)
        num_pipeline, num_data, num_graph = range(shape.pipeline), range(shape.data), range(shape.graph)
        pipelines = [[shape.rank(p, d, g) for p in num_pipeline] for d in num_data for g in num_graph]
        self.down_group = self._own_group(pipelines, timeout=timeout)
        self.up_group = self._own_group(pipelines, timeout=timeout)
        self.control_group = self._own_group(pipelines, timeout=timeout, backend="gloo")
        # The DeviceMesh's groups may be the default group, which stays open.
        self.pipeline_group = self._own_group(pipelines, timeout=timeout)
        copies = [[shape.rank(p, d, g) for d in num_data] for p in num_pipeline for g in num_graph]
        self.data_group = self._own_group(copies, timeout=timeout)
        replicas = [[shape.rank(p, d, g) for p in num_pipeline for g in num_graph] for d in num_data]
        self.replica_group = self._own_group(replicas, timeout=timeout, backend="gloo")
        if shape.graph > 1:
            sharing = [[shape.rank(p, d, g) for g in num_graph] for p in num_pipeline for d in num_data]
            self.graph_group = self._own_group(sharing, timeout=timeout)
        self.alone_group = self._own_group([[r] for r in range(shape.size)])

    def join_stage_ranks(self) -> None:
        """Makes the groups of the ranks that hold the same stages; all ranks have to call it."""
        if self.stage_group is None:
            shape = self.shape
            lists = [
                [shape.rank(p, d, g) for d in range(shape.data) for g in range(shape.graph)]
                for p in range(shape.pipeline)
            ]
            self.stage_group = self._own_group(lists, timeout=self.timeout)
            self.stage_control_group = self._own_group(lists, timeout=self.timeout, backend="gloo")

    def join_expert_ranks(self, size: int) -> None:
        """Makes the groups of the ranks that share experts: neighbours among those that hold the same stages.

        All ranks have to call it.

        Args:
            size: The number of ranks of a group, a divisor of data × graph.
        """
        if self.expert_group is not None:
            return
        shape, num = self.shape, self.shape.data * self.shape.graph
        stages = [
            [shape.rank(p, d, g) for d in range(shape.data) for g in range(shape.graph)] for p in range(shape.pipeline)
        ]
        sharing = [ranks[first : first + size] for ranks in stages for first in range(0, num, size)]
        self.expert_size, self.expert_rank = size, self.stage_rank % size
        self.expert_group = self._own_group(sharing, timeout=self.timeout)
        self.expert_control_group = self._own_group(sharing, timeout=self.timeout, backend="gloo")
        if size < num:
            copies = [ranks[first::size] for ranks in stages for first in range(size)]
            self.expert_copies_group = self._own_group(copies, timeout=self.timeout)
            self.expert_copies_control_group = self._own_group(copies, timeout=self.timeout, backend="gloo")

    @property
    def expert_ranks(self) -> list[int]:
        """Returns the global ranks that share the experts of this rank's stages."""
        first = self.stage_rank - self.expert_rank
        return self.stage_ranks[first : first + self.expert_size]

    @property
    def stage_holders(self) -> Holders:
        """Returns the ranks that hold the same stages as this one, after :meth:`join_stage_ranks`."""
        return Holders(tuple(self.stage_ranks), self.stage_rank, self.stage_group, self.stage_control_group)

    @property
    def expert_holders(self) -> Holders | None:
        """Returns the ranks that hold the same experts as this one; None if no other rank does."""
        if self.expert_copies_group is None:
            return None
        ranks = tuple(self.stage_ranks[self.expert_rank :: self.expert_size])
        group, control_group = self.expert_copies_group, self.expert_copies_control_group
        return Holders(ranks, self.stage_rank // self.expert_size, group, control_group)

    def gathered(self, mine: _T, what: str) -> list[_T]:
        """Returns an object of every rank of the mesh, on all ranks.

        Args:
            mine: The object of this rank.
            what: What it is gathered for, as a noun.
        """
        return [mine] if self.shape.size == 1 else _gathered(mine, what, self.host_group)

    def gathered_over_pipeline(self, mine: _T, what: str) -> list[_T]:
        """Returns an object of every rank of this rank's pipeline, on all of these ranks.

        Args:
            mine: The object of this rank.
            what: What it is gathered for, as a noun.
        """
        return [mine] if self.shape.pipeline == 1 else _gathered(mine, what, self.control_group)

    def gathered_over_graph(self, mine: _T, what: str) -> list[_T]:
        """Returns an object of every graph rank of this rank's stages, on all of these ranks; arguments as above."""
        return [mine] if self.graph_group is None else _gathered(mine, what, self.graph_group)

    def gathered_over_stage(self, mine: _T, what: str) -> list[_T]:
        """Returns an object of every rank that exchanges rows with this rank's stages, on all of these ranks.

        These are the graph ranks, or all ranks that hold the stages where these share experts. Arguments as above.
        """
        if self.expert_size == 1:
            return self.gathered_over_graph(mine, what)
        assert self.stage_control_group is not None
        return _gathered(mine, what, self.stage_control_group)

    def abort(self) -> None:
        """Closes this rank's connections after an error, so that no rank waits for it; the mesh is of no use then."""
        self.aborted = True
        self.down_group = self.up_group = self.control_group = self.host_group = self.pipeline_group = None
        self.replica_group = self.graph_group = self.data_group = self.stage_group = self.stage_control_group = None
        self.alone_group = self.expert_group = self.expert_control_group = self.expert_copies_group = None
        self.expert_copies_control_group = None
        _destroy(self._made)

    def _own_group(self, lists: list[list[int]], **options: Any) -> dist.ProcessGroup:
        """Makes a group of every list of ranks; returns the group of this rank, which is in one of them."""
        group, _ = dist.new_subgroups_by_enumeration(lists, **options)
        self._made.append(group)
        return group

    @property
    def replica_ranks(self) -> list[int]:
        """Returns the global ranks that work on this rank's samples: its pipeline, with all graph ranks."""
        shape = self.shape
        return [shape.rank(p, self.data_rank, g) for p in range(shape.pipeline) for g in range(shape.graph)]

    @property
    def replica_rank(self) -> int:
        """Returns the index of this rank among :attr:`replica_ranks`."""
        return self.replica_ranks.index(self.rank)

    @property
    def stage_ranks(self) -> list[int]:
        """Returns the global ranks that hold the same stages as this rank: the graph ranks of all replicas."""
        shape = self.shape
        return [shape.rank(self.pipeline_rank, d, g) for d in range(shape.data) for g in range(shape.graph)]

    @property
    def stage_rank(self) -> int:
        """Returns the index of this rank among :attr:`stage_ranks`."""
        return self.data_rank * self.shape.graph + self.graph_rank

    @property
    def pipeline_ranks(self) -> list[int]:
        """Returns the global ranks of this rank's pipeline, in order."""
        return [self.shape.rank(p, self.data_rank, self.graph_rank) for p in range(self.shape.pipeline)]


def _gathered(mine: _T, what: str, group: dist.ProcessGroup | None) -> list[_T]:
    found: list[Any] = [None] * dist.get_world_size(group)
    with waiting(what, group):
        dist.all_gather_object(found, mine, group=group)
    return found


def _destroy(groups: list[dist.ProcessGroup]) -> None:
    """Destroys process groups that still exist, and forgets them."""
    while groups:
        with suppress(ValueError):  # all groups were destroyed
            dist.destroy_process_group(groups.pop())


@contextmanager
def as_world(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Makes a group the default group inside the block.

    Modules call collectives in their steps without naming a group (metrics that reduce on every step, losses that
    all-reduce). Ranks of one pipeline reach a step at different times, so over all ranks such a call would hang, and
    would count every sample P times: it has to reduce over the data-parallel replicas only.
    """
    if group is None:
        yield
        return
    from torch.distributed import distributed_c10d

    before = distributed_c10d.GroupMember.WORLD
    distributed_c10d._update_default_pg(group)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(before)
