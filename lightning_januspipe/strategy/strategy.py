"""The Lightning hooks: what the Trainer calls, in the order of a run. No autograd and no messages in here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_januspipe.capture import StageOrigin
from lightning_januspipe.capture.adapters import capturing
from lightning_januspipe.capture.validate.side_effects import replaced_log
from lightning_januspipe.distributed import broadcast_module
from lightning_januspipe.graph import OwnersInLoader
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.replica_balance import Balance, balance_replicas
from lightning_januspipe.loader.resume import same_random_state
from lightning_januspipe.loader.split import require_samples, seed_workers, split_batches
from lightning_januspipe.mesh import Mesh, Size
from lightning_januspipe.runtime.build import CaptureRequest, PipelineBuilder
from lightning_januspipe.runtime.parameter_residence import ParameterResidence
from lightning_januspipe.runtime.pipeline import MessageDtype, Pipeline
from lightning_januspipe.runtime.planner import is_searched
from lightning_januspipe.runtime.single_stage import SingleStage
from lightning_januspipe.schedule import PhaseCosts
from lightning_januspipe.schedule.build import ScheduleName, build_schedule
from lightning_januspipe.strategy.checkpoint_hooks import CheckpointHooks
from lightning_januspipe.strategy.checks import check_module, check_trainer
from lightning_januspipe.strategy.contexts import differentiable, is_fitting, training_mode, unlogged, without_inference
from lightning_januspipe.strategy.launch import ProcessHooks
from lightning_januspipe.strategy.metric_gather import ReplicaGather
from lightning_januspipe.strategy.microbatch_log import LogRecorder, merge_outputs
from lightning_januspipe.strategy.precision import loss_scale, mesh_aware
from lightning_januspipe.strategy.shutdown import CoordinatedShutdown


class UnboundStrategy(ProcessHooks, CheckpointHooks):
    """Trains a potential that conserves energy on several devices: its layers in a pipeline, and replicas of that.

    This is everything that does not depend on which Lightning it is bound to (see
    :mod:`~lightning_januspipe.strategy.registry`).

    Args:
        pipeline_size: Ranks of a pipeline, each with a share of the layers. "auto": the number of processes over
            data_size × graph_size.
        data_size: Replicas of the pipeline, each with batches of its own. "auto": 1 if pipeline_size is "auto" too,
            else as many as the processes are enough for.
        graph_size: Ranks that share the atoms of each micro-batch, for structures that do not fit into one rank's
            memory. More than 1 needs a potential that can be traced, or parts that call ``with_halo``.
        num_microbatches: Into how many micro-batches each batch is split; fewer where a batch has fewer samples. The
            gradient is that of gradient accumulation over the micro-batches. "auto": twice the ranks of a pipeline,
            and 1 in one process.
        schedule: Order of the phases. "wavek-zb" is the fastest and "wavek" the one of the paper; "1f1b-fold" and
            "gpipe" are simpler; "1f1b-2nd" and "hanayo-2nd" are unfolded baselines to compare with.
        wave_size: Micro-batches in a wave of "wavek" and "wavek-zb", which are also the most that a rank holds at once:
            fewer take less memory and more time. "auto": up to twice the ranks of a pipeline.
        potential: Dotted name of the submodule that differentiates the energy, such as "model.potential". None: it is
            found by itself.
        activation: What is kept of a micro-batch between its phases. Only "keep", everything, is available.
        save_distributed_checkpoint: Whether to save checkpoints as folders of torch.distributed.checkpoint, into which
            each rank writes its part, instead of single files. Both kinds are loaded, whatever this is.
        process_group_backend: Backend of torch.distributed, such as "nccl" or "gloo". None: the one of the device.
        timeout: How long a rank waits for a message of another, in seconds or as hours:minutes:seconds (in Python, a
            timedelta).
        memory_limit: Most bytes that saved tensors of micro-batches may take on a rank; "wavek" and "wavek-zb" hold
            fewer micro-batches for it. None: no limit.
        stages: Where the stages come from: "captured" by tracing the potential, or "explicit", declared by it as
            lightning_januspipe.capture.stages.explicit.ExplicitStages. "auto": the first of these that works.
        message_dtype: "bf16" rounds the features that stages send each other, and all gradients of these, to bfloat16
            on the way: half the bytes of float32, and parameter gradients with a relative error of 1e-3 to 1e-2
            (januspipe bench messages measures it). Energies and forces are sent as they are. None: everything is.
        balance: Which samples share a micro-batch: "microbatches" deals out each replica's batch to its own
            micro-batches, "replicas" the samples of all replicas' batches to all of theirs, so that none waits for
            one with more to do. "auto": the latter, where the dataset knows what its samples cost.

    Raises:
        ValueError: An argument is out of its range, or not available.
    """

    lib: Any  # the modules of one Lightning (see registry.Library)

    def __init__(
        self,
        pipeline_size: Size = "auto",
        data_size: Size = "auto",
        graph_size: int = 1,
        num_microbatches: Size = "auto",
        schedule: ScheduleName = "wavek-zb",
        wave_size: Size = "auto",
        potential: str | None = None,
        activation: Literal["keep"] = "keep",
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | float = timedelta(minutes=30),
        memory_limit: float | None = None,
        stages: StageOrigin = "auto",
        message_dtype: MessageDtype | None = None,
        balance: Balance = "auto",
    ) -> None:
        super().__init__()
        if num_microbatches != "auto" and (not isinstance(num_microbatches, int) or num_microbatches < 1):
            raise ValueError(f"num_microbatches={num_microbatches!r}; expected a positive number or 'auto'")
        if not isinstance(graph_size, int) or graph_size < 1:
            raise ValueError(f"graph_size={graph_size!r}; expected a positive number")
        if activation != "keep":
            raise ValueError(f"activation={activation!r} is not available; use activation='keep'")
        build_schedule(schedule, 1, 1, PhaseCosts(1, 1, 1, 1), wave_size=wave_size)  # names the mistake, if any
        if wave_size != "auto" and not is_searched(schedule):
            warnings.warn(f"wave_size={wave_size} has no effect: schedule={schedule!r} has no waves", stacklevel=2)
        self._pipeline_size, self._data_size, self._graph_size = pipeline_size, data_size, graph_size
        if stages not in get_args(StageOrigin):
            raise ValueError(f"stages={stages!r}; expected one of {', '.join(map(repr, get_args(StageOrigin)))}")
        if memory_limit is not None and not (isinstance(memory_limit, (int, float)) and memory_limit > 0):
            raise ValueError(f"memory_limit={memory_limit!r}; expected a number of bytes > 0, or None")
        if message_dtype not in (None, *get_args(MessageDtype)):
            raise ValueError(f"message_dtype={message_dtype!r}; expected 'bf16' or None")
        if balance not in get_args(Balance):
            raise ValueError(f"balance={balance!r}; expected one of {', '.join(map(repr, get_args(Balance)))}")
        self._num_microbatches, self._balance = num_microbatches, balance
        self._builder = PipelineBuilder(schedule, wave_size, memory_limit, potential, stages, message_dtype)
        self._process_group_backend = process_group_backend
        self._timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        if self._timeout <= timedelta(0):
            raise ValueError(f"timeout={timeout!r}; expected a time > 0, in seconds or as a timedelta")
        self._num_nodes = 1
        self._reduce_gradients = True
        self._train_loader: Any = None
        self._eval_loader: Any = None
        self._save_distributed = save_distributed_checkpoint
        self._stage_optimizers, self._unloaded = {}, {}
        self._num_runs = 0
        self._metric_gather = ReplicaGather()
        self.mesh: Mesh | None = None
        self.runner: SingleStage | Pipeline | None = None

    # -- module and data ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Check what the strategy cannot train, then set up as every strategy does."""
        assert self.mesh is not None
        is_undivided = self.mesh.shape.pipeline == self.mesh.shape.graph == 1
        self.runner = SingleStage(self.lightning_module, self.mesh) if is_undivided else None
        if is_fitting(trainer):
            check_module(self.lightning_module, self.lib, str(self.precision_plugin.precision))
            if self.is_distributed:
                self._shutdown = CoordinatedShutdown(trainer, self.mesh, self._num_runs)
        if self.runner is None and self.lib.helpers.is_overridden("configure_model", self.lightning_module):
            self._residence = ParameterResidence(self.lightning_module, self.mesh)
        super().setup(trainer)  # type: ignore[misc]

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the user's optimizer over the whole module; it is pruned once the stages are known."""
        self._reset_optimizers_and_schedulers()
        self._stage_optimizers, self._unloaded = {}, {}
        super().setup_optimizers(trainer)  # type: ignore[misc]
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "LBFGS needs inner products over all parameters; use an element-wise optimizer, like Adam"
                )

    def model_to_device(self) -> None:
        """Move the module to this rank's device, or what of it does not wait for the stages to be known."""
        if self._residence is not None:
            self._residence.wait_for_stages()
        else:
            self.model.to(self.root_device)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        assert self.mesh is not None
        if self.is_distributed:
            broadcast_module(model, self.root_device)
            self._metric_gather.attach(model, self.mesh.data_group)
        return model

    @property
    def precision_plugin(self) -> Any:
        """The precision plugin, clipping gradients over the mesh."""
        return self._precision_plugin if self._precision_plugin is not None else self.lib.precision.Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = None if plugin is None else mesh_aware(plugin, self)

    @property
    def schedule(self) -> str:
        """Name of the schedule."""
        return self._builder.schedule

    def num_microbatches(self) -> int:
        """Into how many micro-batches a training batch is split, where it has as many samples."""
        if self._num_microbatches != "auto":
            return int(self._num_microbatches)
        return 1 if self.mesh_shape.pipeline == 1 else 2 * self.mesh_shape.pipeline

    def process_dataloader(self, dataloader: Any) -> Any:
        """Split training batches into micro-batches, and seed workers by replica."""
        seed_workers(
            dataloader, self.lib.seed.pl_worker_init_function, self.mesh_shape.coordinates(self.global_rank)[1]
        )
        trainer = self.lightning_module.trainer
        if trainer.training:
            require_samples(dataloader)
            required = self._num_microbatches != "auto"
            user = dataloader
            split = split_batches(dataloader, self.num_microbatches(), required, self._owners_ahead())
            dataloader = self._progress.tracked(split)
            self._balance_replicas(dataloader, may_change=dataloader is not user)
            self._train_loader = dataloader
        else:
            self._eval_loader = dataloader
        return dataloader

    def _owners_ahead(self) -> OwnersInLoader | None:
        """Where atoms are divided over ranks, the loader's workers choose who owns which."""
        if self.mesh is None or self.mesh_shape.graph == 1:
            return None
        return OwnersInLoader(self.mesh_shape.graph, self.mesh.replica_rank, len(self.mesh.replica_ranks))

    def _balance_replicas(self, loader: Any, may_change: bool) -> None:
        shape = self.mesh_shape
        if shape.data == 1 or self._balance == "microbatches":
            return
        why = balance_replicas(
            loader,
            self.num_microbatches(),
            shape.data,
            shape.coordinates(self.global_rank)[1],
            required=self._balance == "replicas",
            tell=self.broadcast,
            is_teller=self.global_rank == 0,
            may_change=may_change,
        )
        if why is not None and self._balance == "replicas":
            raise ValueError(
                f"balance='replicas', but the training loader cannot share its samples among replicas: {why}. Use "
                "balance='auto', which then balances inside each replica."
            )

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch, or each of its micro-batches, with the module's own hooks."""
        move = super().batch_to_device  # type: ignore[misc]
        if isinstance(batch, MicroBatches):
            return replace(batch, batches=[move(b, device, dataloader_idx) for b in batch])
        return move(batch, device, dataloader_idx)

    # -- capture -----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Capture the potential and keep only this rank's part of the optimizer."""
        module = self.lightning_module
        if self.num_microbatches() > 1 or not isinstance(self.runner, SingleStage):
            check_trainer(module.trainer, is_pipeline=not isinstance(self.runner, SingleStage))
        # A batch transfer hook of the user gets batches, not the micro-batches' container.
        transfer = module._on_before_batch_transfer
        module.__dict__["_on_before_batch_transfer"] = lambda batch, dataloader_idx=0: (
            replace(batch, batches=[transfer(b, dataloader_idx) for b in batch])
            if isinstance(batch, MicroBatches)
            else transfer(batch, dataloader_idx)
        )
        if not isinstance(self.runner, SingleStage):
            self._capture(self._train_loader, module.training_step, self.num_microbatches())
        if isinstance(self.runner, Pipeline):
            assert self.mesh is not None
            same_random_state(self.mesh)
            self._prune_optimizers()
            self._free_other_stages()
        self._progress.settle()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Training has taken a batch; ask whether any rank was told to stop."""
        results = self.lightning_module.trainer._results
        if isinstance(batch, MicroBatches) and results is not None:
            results.batch_size = sum(batch.num_samples) or None  # for what hooks log without one
        self._progress.moved_on()
        if self._shutdown is not None:
            self._shutdown.ask()

    def on_validation_start(self) -> None:
        """Outside fit, capture the potential from the evaluation step."""
        self._capture_for_evaluation("validation_step")

    def on_test_start(self) -> None:
        """See :meth:`on_validation_start`."""
        self._capture_for_evaluation("test_step")

    def on_predict_start(self) -> None:
        """See :meth:`on_validation_start`."""
        self._capture_for_evaluation("predict_step")

    def _capture_for_evaluation(self, name: str) -> None:
        # In the sanity check before training every rank has the whole module, unless it was made to be divided, but
        # structures that are divided over ranks may be too large for each.
        is_whole = self._residence is None and self.mesh_shape.graph == 1
        if self.runner is None and not (is_whole and is_fitting(self.lightning_module.trainer)):
            self._capture(self._eval_loader, getattr(self.lightning_module, name), 1)

    def _capture(self, loader: Any, step: Callable[..., Any], num_microbatches: int) -> None:
        """One rank captures, all get the same result or the same error."""
        assert self.mesh is not None
        module: Any = self.lightning_module
        trains = is_fitting(module.trainer) and not module.trainer.sanity_checking

        def examples() -> tuple[Any, Any]:
            # A structure that is divided over ranks may be too large for the one that captures.
            is_divided = self.mesh_shape.graph > 1
            first, second = example_batches(loader, num_microbatches, limited=is_divided)
            return self._moved(first), self._moved(second)

        @contextmanager
        def ready(training: bool) -> Generator[None, None, None]:
            quiet = unlogged(module.trainer, self.lib.loggers.DummyLogger)
            with differentiable(), training_mode(module, training), quiet, self.precision_plugin.forward_context():
                yield

        evaluation = module.validation_step if trains and module.trainer.enable_validation else None
        request = CaptureRequest(module, step, examples, num_microbatches, ready, trains, evaluation)
        self.runner, news = self._builder.pipeline(request, self.mesh, self.global_rank, self.broadcast)
        profiler = module.trainer.profiler
        if not isinstance(profiler, self.lib.profilers.PassThroughProfiler):
            self.runner.executor.annotate = profiler.profile
        if news:
            self.lib.rank_zero.rank_zero_info(news)
        if self._residence is not None:
            self._residence.place(self.runner)

    def _moved(self, batch: Any) -> Any:
        batch = self.precision_plugin.convert_input(batch)
        return self.batch_to_device(self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0))

    # -- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """All phases of all micro-batches; the gradients wait for :meth:`backward`."""
        assert self.runner is not None
        module = self.lightning_module
        split = isinstance(batch, MicroBatches)
        batches, sizes = (batch.batches, batch.num_samples) if split else ([batch], [None])
        recorder = LogRecorder()

        def step_of(num_samples: int | None) -> Callable[[Any], Any]:
            def step(microbatch: Any) -> Any:
                recorder.num_samples = num_samples
                return module.training_step(microbatch, *args, **kwargs)

            return step

        with self.precision_plugin.train_step_context(), replaced_log(module, recorder):
            steps = [step_of(n) for n in sizes]
            ahead = batch.ahead if split else ()
            outputs = self.runner.train_step(steps, batches, loss_scale(self.precision_plugin), ahead)
        recorder.replay(module.log)
        return merge_outputs(outputs, type(module).__name__)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the step's gradients into ``p.grad``, with all hooks of a backward pass.

        Automatic optimization zeroes gradients between ``training_step`` and this, so they could not come earlier.
        """
        assert self.runner is not None
        module = self.lightning_module
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.runner.gradients.accumulate_into_grad(1 / module.trainer.accumulate_grad_batches)
        if self._reduce_gradients:
            self.runner.reduce()
        if self._shutdown is not None:
            self._shutdown.hear()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """No reduction while batches are accumulated."""
        self._reduce_gradients = False
        try:
            yield
        finally:
            self._reduce_gradients = True

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """FE and FF, then the user's step on every rank."""
        with self.precision_plugin.val_step_context():
            return self._evaluate(self.lightning_module.validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`validation_step`."""
        with self.precision_plugin.test_step_context():
            return self._evaluate(self.lightning_module.test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`validation_step`."""
        with self.precision_plugin.predict_step_context():
            return self._evaluate(self.lightning_module.predict_step, *args, **kwargs)

    def _evaluate(self, function: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.mesh is not None
        runner = self.runner or SingleStage(self.lightning_module, self.mesh)
        # Before training, a model that compiles itself would do so on every rank, for what the stages do not run.
        whole = capturing(self.lightning_module) if self.runner is None else nullcontext()
        # The Trainer's inference mode would make autograd.grad fail, also under enable_grad.
        with differentiable(), whole:
            return runner.evaluate_step(lambda b: function(b, *args, **kwargs), without_inference(batch))

    # -- the end -----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Leave the whole trained module on every rank."""
        if self._shutdown is not None:
            self._shutdown.hear()
        if self._residence is not None and self._residence.is_partial:
            self._residence.restore()
        elif isinstance(self.runner, Pipeline):
            self.runner.synchronize(self.lightning_module.trainer.callbacks)

    def teardown(self) -> None:
        """Leave nothing on the user's module and optimizers; a checkpoint can still be saved."""
        for stage in self._stage_optimizers.values():
            stage.make_whole()
        module, residence = self.lightning_module, self._residence
        if module is not None:
            module.__dict__.pop("_on_before_batch_transfer", None)
            module._device_mesh = None
            self._metric_gather.detach(module)
        if self._shutdown is not None:
            self._shutdown.release()
        self._train_loader, self._eval_loader, self.runner = None, None, None
        self._shutdown = self._residence = None
        if residence is not None and residence.is_partial:  # after an exception
            residence.leave_device()
            self._lightning_module = None
        super().teardown()  # type: ignore[misc]
        self._lightning_module = module
