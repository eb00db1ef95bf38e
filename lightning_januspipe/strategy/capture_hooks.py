"""Implements the hooks that capture a potential: the start of training, or of evaluation without training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from lightning_januspipe.errors import CaptureError, PipelineError
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.runtime.build_pipeline import CaptureRequest, PipelineBuilder
from lightning_januspipe.runtime.chosen_state import StageSharing
from lightning_januspipe.runtime.pipeline import Pipeline
from lightning_januspipe.runtime.single_stage import SingleStage
from lightning_januspipe.runtime.training_length import TrainingLength
from lightning_januspipe.strategy.contexts import (
    accumulates,
    differentiable,
    is_fitting,
    training_length,
    training_mode,
    unlogged,
)
from lightning_januspipe.strategy.initial_value_hooks import InitialValueHooks
from lightning_januspipe.strategy.options import StrategyOptions


class CaptureHooks(InitialValueHooks):
    """Captures the potential, and gets the runner of this rank's stages."""

    def __init__(self, options: StrategyOptions) -> None:
        super().__init__(options)
        self._builder = PipelineBuilder(
            options.schedule,
            options.wave_size,
            options.memory_limit,
            options.potential,
            options.stages,
            options.message_dtype,
            options.compile,
            options.activation,
            options.expert_placement,
            options.exchange_dtype,
        )

    @override
    def on_validation_start(self) -> None:
        """Captures the potential from the evaluation step, unless training captures it."""
        self._capture_for_evaluation("validation_step")
        if self.runner is not None:  # replicas may have unequal numbers of batches, and cannot meet in steps
            self.runner.parameters.make_whole()
            if self._exchanges_with_replicas:
                self._require_as_many_batches()

    @override
    def on_test_start(self) -> None:
        """Does the same as :meth:`on_validation_start`."""
        self._capture_for_evaluation("test_step")

    @override
    def on_predict_start(self) -> None:
        """Does the same as :meth:`on_validation_start`."""
        self._capture_for_evaluation("predict_step")

    def _require_as_many_batches(self) -> None:
        """Refuses validation where a replica has fewer batches than others, to whose rows its experts are applied.

        Raises:
            PipelineError: The replicas have unequal numbers of batches.
        """
        mesh = self._mesh
        counts = mesh.gathered((mesh.data_rank, tuple(self._trainer.num_val_batches)), "numbers of validation batches")
        if len({numbers for _, numbers in counts}) > 1:
            found = ", ".join(f"{list(numbers)} of replica {replica}" for replica, numbers in sorted(set(counts)))
            raise PipelineError(
                f"the replicas have unequal numbers of validation batches ({found}), but expert_size="
                f"{self.options.expert_size} spreads experts over replicas, which evaluate batches together. Give all "
                "replicas the same number of batches, or set limit_val_batches to the smallest one; or use an "
                f"expert_size that divides graph_size={self.mesh_shape.graph}."
            )

    def _capture_for_evaluation(self, name: str) -> None:
        # The sanity check before training needs no stages where each rank holds the whole module and whole structures.
        is_whole = self._residence is None and self.mesh_shape.graph == 1
        if self.runner is None and not (is_whole and is_fitting(self._trainer)):
            self._capture(self._eval_loader, getattr(self._module, name), 1)

    def _capture_for_training(self) -> None:
        """Captures the potential; what cannot be captured, and need not be, is trained as it is."""
        loader = self._train_loader
        try:
            self._capture(loader, self._module.training_step, self._usual_microbatches(loader))
        except CaptureError as error:
            if self._has_to_capture:
                raise
            self._stay_plain(error)

    def _stay_plain(self, reason: Exception, check: Callable[[], None] = lambda: None) -> None:
        """Trains the module as it is, where it need not be captured, if that passes a check."""
        self._stays_plain, self.runner = True, SingleStage(self._module, self._mesh)
        check()
        self.lib.rank_zero.rank_zero_info(f"januspipe: the module is trained as it is, not compiled: {reason}")

    def _capture(self, loader: Any, step: Callable[..., Any], num_microbatches: int) -> None:
        """Has one rank capture; all ranks get the same result or the same error."""
        module, trainer = self._module, self._trainer
        trains = is_fitting(trainer) and not trainer.sanity_checking

        if trains and self._spreads_experts:
            self._mesh.join_expert_ranks(self.options.expert_size)
            if self.options.compile:
                self._mesh.join_stage_ranks()

        def examples() -> tuple[Any, Any]:
            # Structures that are sharded over graph ranks may be too large for the rank that captures.
            first, second = example_batches(loader, num_microbatches, limited=self.mesh_shape.graph > 1)
            return self._moved(first), self._moved(second)

        @contextmanager
        def ready(training: bool) -> Generator[None, None, None]:
            quiet = unlogged(trainer, self.lib.loggers.DummyLogger)
            with differentiable(), training_mode(module, training), quiet, self.precision_plugin.forward_context():
                yield

        is_profiled = not isinstance(trainer.profiler, self.lib.profilers.PassThroughProfiler)
        residence, (whole, gradient_bytes) = self._residence, self._paging()
        request = CaptureRequest(
            module,
            step,
            examples,
            num_microbatches,
            ready,
            trains,
            evaluation_step=module.validation_step if trains and trainer.enable_validation else None,
            annotate=trainer.profiler.profile if is_profiled else None,
            sharing=self._sharing() if trains else StageSharing(),
            length=training_length(trainer) if trains else TrainingLength(),
            place=None if residence is None else residence.place,
            whole=whole,
            gradient_bytes=gradient_bytes,
            fetched=None if residence is None or residence.is_paged else residence.whole,
        )
        if trains and self.options.compile is True:
            told = "phases that are not in the cache are compiled before the first step, which may take minutes"
            self.lib.rank_zero.rank_zero_info(f"januspipe: {told}")
        self.lib.rank_zero.rank_zero_info("januspipe: capturing the potential, and measuring where to cut it")
        pipeline, news = self._builder.pipeline(request, self._mesh, self.global_rank, self.broadcast)
        self._chosen_level = self._builder.level
        if self._shutdown is not None:  # replicas may have unequal numbers of batches
            pipeline.schedules.before_meeting = self._shutdown.hear
            if pipeline.change_over is not None:
                self._shutdown.is_compiling = pipeline.change_over.is_waiting
        self.runner = pipeline
        if news.line:
            self.lib.rank_zero.rank_zero_info(news.line)
            self.lib.rank_zero.rank_zero_debug(news.details)

    def _change_to_compiled(self) -> None:
        """Lets compiled phases run from this step on, if the ranks have compiled all of them in the background."""
        runner = self.runner
        if not isinstance(runner, Pipeline) or runner.change_over is None or runner.change_over.is_over:
            return
        shutdown = self._shutdown
        is_ready = not runner.change_over.is_waiting() if shutdown is None else shutdown.all_have_compiled
        if is_ready:
            words = runner.change_to_compiled()
            self.lib.rank_zero.rank_zero_info(f"januspipe: from step {self._trainer.global_step} on: {words}")

    def _end_compiling(self) -> None:
        """Ends what compiles in the background, if anything does."""
        if isinstance(self.runner, Pipeline) and self.runner.change_over is not None:
            self.runner.change_over.end()

    def _sharing(self) -> StageSharing:
        """Returns what the ranks that hold the same stages may share in training."""
        size = self._mesh.shape.data * self._mesh.shape.graph
        return StageSharing(
            self._shard_levels,
            size,
            self._stage_link,
            self.optimizers,
            others_leave=self._residence is not None,
            accumulates=accumulates(self._trainer),
            expert_size=self.options.expert_size,
        )

    def _moved(self, batch: Any) -> Any:
        batch = self.precision_plugin.convert_input(batch)
        return self.batch_to_device(self._module._on_before_batch_transfer(batch, dataloader_idx=0))
