"""Implements the hooks that the Trainer calls in training and evaluation, in the order of a run.

Four subjects have files of their own: processes (``launch``), loaders (``loaders``), the capture (``capture_hooks``)
and checkpoints (``checkpoint_hooks``). :mod:`~lightning_januspipe.strategy.registry` binds all of it to a Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.capture.adapters import capturing
from lightning_januspipe.capture.patches import patched
from lightning_januspipe.distributed import broadcast_module, waiting
from lightning_januspipe.engine.gradients import require_finite_gradients
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.random_state import broadcast_random_state
from lightning_januspipe.runtime.chosen_state import measured_link
from lightning_januspipe.runtime.initial_values import without_values
from lightning_januspipe.runtime.single_stage import SingleStage
from lightning_januspipe.strategy.capture_hooks import CaptureHooks
from lightning_januspipe.strategy.checkpoint_hooks import CheckpointHooks
from lightning_januspipe.strategy.checks import check_compiler, check_module, check_trainer
from lightning_januspipe.strategy.contexts import differentiable, is_fitting, without_inference
from lightning_januspipe.strategy.ending import describe_interruption, newest_checkpoint
from lightning_januspipe.strategy.failure import shorten_tracebacks
from lightning_januspipe.strategy.launch import ProcessHooks
from lightning_januspipe.strategy.loaders import LoaderHooks
from lightning_januspipe.strategy.metric_gather import ReplicaGather
from lightning_januspipe.strategy.microbatch_log import LogRecorder, merge_outputs
from lightning_januspipe.strategy.old_gradients import free_old_gradients
from lightning_januspipe.strategy.options import options_of, takes_options
from lightning_januspipe.strategy.precision import loss_scale, mesh_aware
from lightning_januspipe.strategy.quiet import ignore_unreduced, quieten
from lightning_januspipe.strategy.shutdown import CoordinatedShutdown

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins import Precision


class UnboundStrategy(ProcessHooks, LoaderHooks, CaptureHooks, CheckpointHooks):
    """Trains a conservative potential on several devices: its layers in a pipeline, replicas of it, and atom shards.

    Raises:
        ValueError: An argument is of another type or out of its range.
    """

    @takes_options
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shorten_tracebacks()
        super().__init__(options_of(*args, **kwargs))
        quieten(self.lib)
        self._reduce_gradients = True
        self._metric_gather = ReplicaGather()

    # -- before training: the module, its optimizer, its precision ---------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        """Checks that the module can be trained, then sets it up as every strategy does."""
        self._take_over_samplers(trainer)
        ignore_unreduced(self.mesh_shape.data == 1)  # the ranks of one pipeline log the same
        self._stays_plain = False
        self.runner = None if self._captures else SingleStage(self._module, self._mesh)
        if self.options.compile is True:
            check_compiler(self.root_device.type)
        if is_fitting(trainer):
            check_module(self._module, self.lib, str(self.precision_plugin.precision))
            if self.is_distributed:
                self._shutdown = CoordinatedShutdown(trainer, self._mesh, self._num_runs)
        self._give_initial_values()
        super().setup(trainer)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes the user's optimizer over the whole module; it is pruned once the stages are known."""
        self._reset_optimizers_and_schedulers()
        self._stage_optimizers, self._unloaded = {}, {}
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "LBFGS takes inner products over all parameters, but a rank has the gradients of its stages only. "
                    "Use an element-wise optimizer, such as Adam."
                )
            if self._residence is not None and any(optimizer.state.get(p) for p in self._residence.absent):
                self._reset_optimizers_and_schedulers()  # states without values cannot be moved when the run ends
                raise ValueError(
                    f"{type(optimizer).__name__} makes its state before the stages are known, when only global rank 0 "
                    "has parameters that were made on the meta device. Use another optimizer, such as Adam, or make "
                    "the module in host memory."
                )

    @override
    def model_to_device(self) -> None:
        """Moves the module to this rank's device; parameters that may leave this rank wait for the stages."""
        if self._residence is not None:
            self._residence.wait_for_stages()
        else:
            self._module.to(self.root_device)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.is_distributed:
            absent = () if self._residence is None else self._residence.absent
            broadcast_module(model, self.root_device, absent)
            self._metric_gather.attach(model, self._mesh.data_group)
        return model

    @property
    @override
    def precision_plugin(self) -> Precision:
        """Returns the precision plugin, which clips gradients over the mesh."""
        return self._precision_plugin if self._precision_plugin is not None else self.lib.precision.Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else mesh_aware(plugin, self)

    # -- training ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        """Captures the potential and keeps only this rank's part of the optimizer."""
        has_parts = self._shares_replicas or self._shard_levels != ("none",) or self._spreads_experts
        if self.num_microbatches() > 1 or self._captures or has_parts:
            self._check_trainer(has_parts)
        self._give_batches_to_transfer_hooks()
        if self._shard_levels != ("none",):
            self._mesh.join_stage_ranks()
            self._stage_link = measured_link(self._mesh, self.broadcast)
        if self._captures:
            self._capture_for_training()
            if self._shares_replicas:
                # The ranks of a replica run the same steps, so they have to draw the same numbers.
                with waiting("exchange of random states", self._mesh.replica_group):
                    broadcast_random_state(self._mesh.replica_ranks[0], self._mesh.replica_group)
        if self._captures or has_parts:
            self._prune_optimizers()
        if self._captures:
            self._free_other_stages()
        self._progress.training_starts()

    def _check_trainer(self, has_parts: bool) -> None:
        """Refuses what stages or parts of gradients would make wrong; without need nothing is captured then."""

        def check() -> None:
            check_trainer(
                self._trainer,
                is_captured=self._captures,
                has_parts=has_parts,
                spreads_experts=self._spreads_experts,
            )

        try:
            check()
        except ValueError as error:
            if self._has_to_capture or not self._captures:
                raise
            self._stay_plain(error, check)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Counts the batch, and asks the other ranks whether any was told to stop."""
        results = self._trainer._results
        if isinstance(batch, MicroBatches) and results is not None:
            results.batch_size = sum(batch.num_samples) or None  # for hooks that log without a batch_size
        self._progress.batch_is_taken(self._trainer.current_epoch)
        if self._shutdown is not None:
            self._shutdown.ask()

    @override
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs all phases of all micro-batches; the gradients wait for :meth:`backward`."""
        assert self.runner is not None
        self._change_to_compiled()
        self.runner.parameters.allow_gradients()
        free_old_gradients(self._trainer)
        module = self._module
        split = isinstance(batch, MicroBatches)
        batches, sizes = (batch.batches, batch.num_samples) if split else ([batch], [None])
        recorder = LogRecorder()

        def step_of(num_samples: int | None) -> Callable[[Any], Any]:
            def step(microbatch: Any) -> Any:
                recorder.num_samples = num_samples
                return module.training_step(microbatch, *args, **kwargs)

            return step

        with self.precision_plugin.train_step_context(), patched(module, "log", recorder):
            steps = [step_of(n) for n in sizes]
            owners = batch.owners if split else ()
            scale, reduces = loss_scale(self.precision_plugin), self._reduce_gradients
            outputs = self.runner.train_step(steps, batches, scale, owners, reduces)
        recorder.replay(module.log)
        return merge_outputs(outputs, type(module).__name__)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulates the step's gradients into ``.grad`` and reduces them, with all hooks of a backward pass.

        Automatic optimization zeroes ``.grad`` between ``training_step`` and this hook, so it has to happen here.
        """
        assert self.runner is not None
        module = self._module
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        factor = 1 / self._trainer.accumulate_grad_batches
        self.runner.parameters.accumulate_gradients(factor)
        if self._shutdown is not None:
            self._shutdown.hear()  # before the reduction, in which replicas would wait for one without a batch
        if loss_scale(self.precision_plugin) == 1.0:  # a gradient scaler looks for overflows itself
            require_finite_gradients(self.runner.parameters.local_gradients(), self.global_rank)
        if self._reduce_gradients:
            self.runner.parameters.reduce_gradients(factor)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Steps an optimizer; averaged parameters are there afterwards, even if a scaler has left the step out."""
        result = super().optimizer_step(*args, **kwargs)
        if self.runner is not None:
            self.runner.parameters.make_averaged_whole()
        return result

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Skips the reduction of gradients while batches are accumulated."""
        self._reduce_gradients = False
        try:
            yield
        finally:
            self._reduce_gradients = True

    @override
    def on_train_end(self) -> None:
        """Leaves the whole trained module on every rank."""
        self._end_compiling()
        if self._shutdown is not None:
            self._shutdown.hear()
        if self.runner is not None:
            self.runner.parameters.make_whole()
        if self._residence is not None and self._residence.is_partial:
            self._residence.restore()
        elif self.runner is not None:
            self.runner.parameters.synchronize(self._trainer.callbacks)

    # -- evaluation --------------------------------------------------------------------------------------------------

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs FE and FF on the stages, then the user's step on every rank."""
        with self.precision_plugin.val_step_context():
            output = self._evaluate(self._module.validation_step, *args, **kwargs)
            self._discard_repeated()
            return output

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``test_step`` as :meth:`validation_step` runs its own."""
        with self.precision_plugin.test_step_context():
            output = self._evaluate(self._module.test_step, *args, **kwargs)
            self._discard_repeated()
            return output

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``predict_step`` as :meth:`validation_step` runs its own."""
        with self.precision_plugin.predict_step_context():
            return self._evaluate(self._module.predict_step, *args, **kwargs)

    def _evaluate(self, function: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner or SingleStage(self._module, self._mesh)
        # A model that compiles itself would do so on every rank before training, for code that the stages do not run.
        whole = capturing(self._module) if self.runner is None else nullcontext()
        with differentiable(), whole:
            return runner.evaluate_step(lambda b: function(b, *args, **kwargs), without_inference(batch))

    # -- the end -----------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Closes this rank's connections, so that no other waits for it, unless all ranks have ended alike."""
        self._end_compiling()
        if self._failure is not None and isinstance(exception, Exception):
            self._failure.note(exception)
        is_stopped = self._began > 0 and isinstance(exception, (KeyboardInterrupt, SystemExit))
        if is_stopped and is_fitting(self._trainer):
            saved = newest_checkpoint(self._trainer, self._began)
            self.lib.rank_zero.rank_zero_info(describe_interruption(self._trainer, exception, *saved))
        if self._shutdown is not None:
            self._shutdown.give_up()

    @override
    def teardown(self) -> None:
        """Gives module, optimizers and metrics back as they were; a checkpoint can still be saved afterwards."""
        ignore_unreduced(False)
        self._end_compiling()
        are_there = [stage.release() for stage in self._stage_optimizers.values()]
        module, residence = self.lightning_module, self._residence
        if module is not None:
            module.__dict__.pop("_on_before_batch_transfer", None)
            module._device_mesh = None
            self._metric_gather.detach(module)
            if self._shares_samples:
                self._hand_back_samplers(module.trainer)
        if self._shutdown is not None:
            self._shutdown.release()
        self._train_loader, self._eval_loader, self.runner = None, None, None
        self._shutdown = self._residence = None
        if residence is not None and module is not None and all(are_there):
            if residence.is_partial:  # after an exception
                self._note_lost_values(module)
            if without_values(module):
                residence.leave_device()
        if not all(are_there) or (module is not None and without_values(module)):
            self._lightning_module = None  # what is not there cannot be moved
        super().teardown()
        self._lightning_module = module
