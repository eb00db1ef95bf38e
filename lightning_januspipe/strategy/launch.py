"""Implements the hooks of processes: they start, join the mesh, and run the collectives that the Trainer calls."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

import __main__
from lightning_januspipe.distributed import PatientStore, waiting
from lightning_januspipe.loader.resume import LoaderProgress
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.strategy.environment import check_joined, check_script, check_variables
from lightning_januspipe.strategy.failure import FailureReport
from lightning_januspipe.strategy.launcher import RankProcesses, script_launcher
from lightning_januspipe.strategy.shared_state import StrategyState
from lightning_januspipe.strategy.threads import share_cores


class ProcessHooks(StrategyState):
    """Starts processes and puts them on the mesh."""

    @property
    def process_group_backend(self) -> str | None:
        """Returns the backend of torch.distributed; None in one process, unless the user gave one."""
        if self.options.process_group_backend is not None or not self.is_distributed:
            return self.options.process_group_backend
        return str(self.lib.distributed._get_default_process_group_backend_for_device(self.root_device))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Returns the arguments with which a sampler gives each replica samples of its own, and its ranks the same."""
        return {"num_replicas": self.mesh_shape.data, "rank": self.replica_index}

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero helpers which rank this process is."""
        if self.cluster_environment is not None:
            check_variables(self.cluster_environment, self.num_processes, self._num_nodes, os.environ)
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self._num_nodes * self.num_processes)
        for module in (self.lib.rank_zero, self.lib.utils_rank_zero):
            module.rank_zero_only.rank = self.global_rank

    @override
    def _configure_launcher(self) -> None:
        # All of this raises errors before any process is started.
        world = self.mesh_shape.size
        environment = self.cluster_environment
        assert environment is not None
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self._num_nodes)
        if self.is_distributed and dist.is_initialized():
            check_joined(dist.get_world_size(), world)
        if self.is_distributed and not environment.creates_processes_externally:
            check_script(__main__, sys.argv)
            launcher: Any = script_launcher(self.lib)
            self._launcher = launcher(environment, self.num_processes, self._num_nodes)

    @override
    def setup_environment(self) -> None:
        """Starts torch.distributed and makes the mesh."""
        super().setup_environment()
        self.lib.seed.reset_seed()
        self.set_world_ranks()
        hook = sys.excepthook
        if self.is_distributed:
            self._join()
        if self.mesh is None or self.mesh.aborted:
            self.mesh = Mesh(self.mesh_shape, self.global_rank, self.root_device, self.options.message_timeout)
            if self.is_distributed:
                share_cores(self.mesh.host_group, self.global_rank, self.mesh_shape.size)
        self._module._device_mesh = self.mesh.device_mesh
        self._loader_progress = LoaderProgress(self.root_device)
        self._num_runs += 1
        self._began = time.time()
        if self.is_distributed:
            store = PatientStore(dist.distributed_c10d._get_default_store())
            self._failure = FailureReport(
                self.global_rank, self.mesh_shape.size, store, self._launcher, run=self._num_runs, hook=hook
            )

    def _join(self) -> None:
        """Starts torch.distributed."""
        # Without device_id: with it, NCCL's sends and receives would wait for one another whatever their peers.
        options: dict[str, Any] = {}
        launcher: Any = self._launcher
        if isinstance(launcher, RankProcesses) and launcher.store_listener is not None:
            options["store"] = launcher.store(self.mesh_shape.size)
        self.lib.distributed._init_dist_connection(self.cluster_environment, self.process_group_backend, **options)
        if isinstance(launcher, RankProcesses):
            launcher.has_joined = True

    # -- collectives for Lightning -----------------------------------------------------------------------------------

    def _is_joined(self) -> bool:
        """Returns whether there are other ranks, and this rank has not closed its connections to them."""
        return self.is_distributed and dist.is_initialized() and not (self.mesh is not None and self.mesh.aborted)

    def _host_group(self) -> dist.ProcessGroup | None:
        # A rank that fails closes this group, so that no other waits in it.
        return None if self.mesh is None else self.mesh.host_group

    @override
    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks."""
        if self._is_joined():
            with waiting(f"barrier {name or ''}".strip(), self._host_group()):
                dist.barrier(group=self._host_group())

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the object of one global rank on all ranks."""
        if not self._is_joined():
            return obj
        objects = [obj]
        with waiting(f"what global rank {src} tells the others", self._host_group()):
            dist.broadcast_object_list(objects, src, group=self._host_group())
        return objects[0]

    def _has_replicas(self, group: Any) -> bool:
        """Tells whether there is something to reduce over, and this rank has not closed its connections."""
        return self.mesh is not None and not self.mesh.aborted and (group is not None or self.mesh.shape.data > 1)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over the replicas: the ranks of one pipeline hold the same values."""
        if not isinstance(tensor, Tensor) or not self._has_replicas(group):
            return tensor
        if reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            # Replicas may have counted unequal numbers of samples, of which Lightning would round the mean down.
            tensor = tensor.double()
        group = group or self._mesh.data_group
        with waiting("reduction of a logged value over replicas", group):
            return self.lib.distributed._sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor over the D replicas as ``(D, ...)``; with one replica returns the tensor itself."""
        if not self._has_replicas(group):
            return tensor
        group = group or self._mesh.data_group
        with waiting("all_gather over replicas", group):
            return self.lib.distributed._all_gather_ddp_if_available(tensor, group=group, sync_grads=sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Returns whether all ranks of the mesh (or any of them) decided for something."""
        if not self._is_joined():
            return decision
        group = self._host_group()
        count = torch.tensor(int(decision), device="cpu" if group is not None else self.root_device)
        with waiting("a decision of all ranks", group):
            dist.all_reduce(count, group=group)
        return bool(count == dist.get_world_size()) if all else bool(count > 0)
