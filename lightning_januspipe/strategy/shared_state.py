"""Holds the state that the parts of the strategy share: its options, the mesh, and objects that live for one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from lightning_januspipe.loader.resume import LoaderProgress
from lightning_januspipe.loader.split import batch_size_of
from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.runtime.parameter_residence import ParameterResidence
from lightning_januspipe.runtime.runner import Runner
from lightning_januspipe.runtime.stage_optimizer import StageOptimizer
from lightning_januspipe.runtime.state_share import levels_of
from lightning_januspipe.schedule import Link
from lightning_januspipe.schedule.state_actions import ShardLevel
from lightning_januspipe.strategy.contexts import is_fitting
from lightning_januspipe.strategy.failure import FailureReport
from lightning_januspipe.strategy.library import Library
from lightning_januspipe.strategy.options import StrategyOptions
from lightning_januspipe.strategy.shutdown import CoordinatedShutdown

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import ParallelStrategy
else:
    ParallelStrategy = object  # registry.py adds that of one Lightning or the other


class StrategyState(ParallelStrategy):
    """Holds the state of the strategy, and tells the sizes that follow from it.

    Args:
        options: The arguments that the user gave.

    Attributes:
        lib: The modules of the Lightning that the strategy is bound to.
        options: See above.
        mesh: This rank's process groups; None before ``setup_environment``.
        runner: Runs this rank's steps; None until the stages are known.
    """

    lib: ClassVar[Library]

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__()
        self.options = options
        self.mesh: Mesh | None = None
        self.runner: Runner | None = None
        self._num_nodes = 1
        self._num_runs = 0
        self._began = 0.0  # when the present run began, in seconds since the epoch
        self._stays_plain = False  # whether this run could not be captured, and need not be
        self._loader_progress: LoaderProgress | None = None
        self._shutdown: CoordinatedShutdown | None = None
        self._failure: FailureReport | None = None
        self._residence: ParameterResidence | None = None
        self._stage_link = Link()  # between the ranks that hold the same stages, if they share state
        self._chosen_level: ShardLevel = "none"  # of shard="auto", once the potential is captured
        self._stage_optimizers: dict[int, StageOptimizer] = {}
        self._unloaded: dict[int, dict[str, Any]] = {}  # states of optimizers that wait until the stages are known
        self._had_own_experts = False  # whether experts are whole only until a checkpoint is saved
        self._is_own_state: bool | None = None  # whether the state of the module has its parameters themselves
        self._shares_samples = False
        self._train_loader: Any = None
        self._eval_loader: Any = None

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh

    @property
    def _progress(self) -> LoaderProgress:
        assert self._loader_progress is not None
        return self._loader_progress

    @property
    def _trainer(self) -> Any:  # most of its attributes are set where type checkers do not see it
        return self._module.trainer

    @property
    def schedule(self) -> str:
        """Returns the name of the schedule."""
        return self.options.schedule

    def num_microbatches(self) -> int:
        """Returns the number of micro-batches of a training batch; a batch with fewer samples has fewer."""
        if self.options.num_microbatches != "auto":
            return self.options.num_microbatches
        return 1 if self.mesh_shape.pipeline == 1 else 2 * self.mesh_shape.pipeline

    def _usual_microbatches(self, loader: Any) -> int:
        """Returns the number of micro-batches of a whole batch of a loader: it has at most as many as samples."""
        return min(self.num_microbatches(), batch_size_of(loader) or self.num_microbatches())

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Tells whether there are several ranks, so that the Trainer replaces samplers and honours ``sync_dist``."""
        return self.num_processes * self._num_nodes > 1

    @property
    def num_nodes(self) -> int:
        """Returns the number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Returns the number of processes on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 1

    @property
    def mesh_shape(self) -> MeshShape:
        """Returns the sizes of the three axes of the mesh.

        Raises:
            ValueError: Their product is not the number of processes, or the experts cannot be shared evenly.
        """
        world = self._num_nodes * self.num_processes
        options = self.options
        shape = MeshShape.resolve(options.pipeline_size, options.data_size, options.graph_size, world)
        if shape.data * shape.graph % options.expert_size:
            raise ValueError(
                f"expert_size={options.expert_size}; expected a divisor of data_size × graph_size = {shape.data} × "
                f"{shape.graph} = {shape.data * shape.graph}, the number of ranks that hold the same stages"
            )
        return shape

    @property
    def _captures(self) -> bool:
        """Tells whether to capture the potential, because it has to be or in order to compile where possible."""
        may_compile = self.options.compile == "auto" and is_fitting(self._trainer) and not self._stays_plain
        return self._has_to_capture or may_compile

    @property
    def _has_to_capture(self) -> bool:
        """Tells whether ranks share samples or experts, or phases are not plain."""
        options = self.options
        is_limited = options.memory_limit is not None and is_fitting(self._trainer)
        is_plain = options.compile is not True and options.activation not in ("recompute", "offload") and not is_limited
        return self._shares_replicas or self._spreads_experts or not is_plain

    @property
    def _spreads_experts(self) -> bool:
        """Tells whether ranks that hold the same stages share their experts."""
        return self.options.expert_size > 1

    @property
    def _exchanges_with_replicas(self) -> bool:
        """Tells whether replicas evaluate batches together, as the experts of a stage are spread over several."""
        return is_fitting(self._trainer) and self.mesh_shape.graph % self.options.expert_size != 0

    @property
    def _shares_replicas(self) -> bool:
        """Tells whether several ranks work on the samples of a replica."""
        return self.mesh_shape.ranks_per_replica > 1

    @property
    def _shard_level(self) -> ShardLevel:
        """Returns what the ranks that hold the same stages share: nothing if there is one such rank."""
        levels = self._shard_levels
        return levels[0] if len(levels) == 1 else self._chosen_level

    @property
    def _shard_levels(self) -> tuple[ShardLevel, ...]:
        """Returns what these ranks may share, the simplest first."""
        chooses = self.options.memory_limit is not None
        return levels_of(self.options.shard, self.mesh_shape.data * self.mesh_shape.graph, chooses)

    @property
    def replica_index(self) -> int:
        """Returns the index of this rank's replica."""
        return self.mesh_shape.coordinates(self.global_rank)[1]

    @property
    @override
    def world_size(self) -> int:
        """Returns the number of replicas.

        Modules multiply losses, and callbacks multiply counts, by ``trainer.world_size``. Ranks of one pipeline see the
        same samples, so only replicas count.
        """
        return self.mesh_shape.data

    @property
    @override
    def root_device(self) -> torch.device:
        """Returns this rank's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]
