"""The Lightning hooks of processes: how many there are, how they start, and the collectives that the Trainer calls."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.loader.resume import LoaderProgress
from lightning_januspipe.mesh import Mesh, MeshShape, Size


class ProcessHooks:
    """The part of the strategy that starts processes and lays the mesh over them."""

    lib: Any
    mesh: Mesh | None
    parallel_devices: Any
    cluster_environment: Any
    _pipeline_size: Size
    _data_size: Size
    _graph_size: int
    _num_nodes: int
    _num_runs: int
    _process_group_backend: str | None
    _timeout: timedelta
    _progress: LoaderProgress

    @property
    def is_distributed(self) -> bool:
        """Whether the Trainer has to inject distributed samplers and honour ``sync_dist``."""
        return self.num_processes * self._num_nodes > 1

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Processes on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def mesh_shape(self) -> MeshShape:
        """Sizes of the three axes.

        Raises:
            ValueError: they do not multiply to the number of processes.
        """
        world = self._num_nodes * self.num_processes
        return MeshShape.resolve(self._pipeline_size, self._data_size, self._graph_size, world)

    @property
    def world_size(self) -> int:
        """Number of data-parallel replicas.

        Modules multiply losses, and callbacks multiply counts, by ``trainer.world_size``: ranks of one pipeline see the
        same samples, so only replicas count.
        """
        return self.mesh_shape.data

    @property
    def process_group_backend(self) -> str | None:
        """Backend of torch.distributed."""
        return self._process_group_backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one pipeline draw the same samples."""
        shape = self.mesh_shape
        return {"num_replicas": shape.data, "rank": shape.coordinates(self.global_rank)[1]}

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and Lightning's rank-zero helpers who this process is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self._num_nodes * self.num_processes)
        for module in (self.lib.rank_zero, self.lib.utils_rank_zero):
            module.rank_zero_only.rank = self.global_rank

    def _configure_launcher(self) -> None:
        _ = self.mesh_shape  # an error here comes before any process is started
        assert self.cluster_environment is not None
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self._num_nodes)
        if self.is_distributed and not self.cluster_environment.creates_processes_externally:
            self._launcher = self.lib.launcher._SubprocessScriptLauncher(
                self.cluster_environment, self.num_processes, self._num_nodes
            )

    def setup_environment(self) -> None:
        """Start torch.distributed and lay the mesh."""
        super().setup_environment()  # type: ignore[misc]
        self.lib.seed.reset_seed()
        self.set_world_ranks()
        if self.is_distributed:
            self._process_group_backend = (
                self._process_group_backend
                or self.lib.distributed._get_default_process_group_backend_for_device(self.root_device)
            )
            # Without device_id, which would let NCCL's sends and receives wait for one another whatever their peers.
            self.lib.distributed._init_dist_connection(self.cluster_environment, self._process_group_backend)
        if self.mesh is None or self.mesh.aborted:
            self.mesh = Mesh(self.mesh_shape, self.global_rank, self.root_device, self._timeout)
        self.lightning_module._device_mesh = self.mesh.device_mesh
        self._progress = LoaderProgress(self.root_device)
        self._num_runs += 1

    # -- collectives for Lightning -----------------------------------------------------------------------------------

    def _is_joined(self) -> bool:
        """Whether there are other ranks, with none of which this one has broken off."""
        return self.is_distributed and dist.is_initialized() and not (self.mesh is not None and self.mesh.aborted)

    def _host_group(self) -> dist.ProcessGroup | None:
        # A rank that fails closes it, so that the others do not wait there.
        return None if self.mesh is None else self.mesh.host_group

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if self._is_joined():
            dist.barrier(group=self._host_group())

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """An object of one global rank, on all ranks."""
        if not self._is_joined():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src, group=self._host_group())
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data-parallel replicas: the ranks of one pipeline hold the same values."""
        if not isinstance(tensor, Tensor) or self.mesh is None or (group is None and self.mesh.shape.data == 1):
            return tensor
        return self.lib.distributed._sync_ddp_if_available(tensor, group or self.mesh.data_group, reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data-parallel replicas, as ``(D, ...)``; in one replica the tensor itself."""
        if self.mesh is None or (group is None and self.mesh.shape.data == 1):
            return tensor
        return self.lib.distributed._all_gather_ddp_if_available(
            tensor, group=group or self.mesh.data_group, sync_grads=sync_grads
        )

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """A decision of all ranks of the mesh."""
        if not self._is_joined():
            return decision
        group = self._host_group()
        count = torch.tensor(int(decision), device="cpu" if group is not None else self.root_device)
        dist.all_reduce(count, group=group)
        return bool(count == dist.get_world_size()) if all else bool(count > 0)
