"""From a LightningModule and a loader's samples to this rank's part of a pipeline: one rank captures, all get it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_januspipe.capture import (
    Capture,
    CaptureError,
    PhaseMode,
    ProgramCache,
    StageOrigin,
    capture_module,
)
from lightning_januspipe.capture.find.grad_call import StepFunction
from lightning_januspipe.distributed import on_first_rank
from lightning_januspipe.engine.p2p import Links, message_latency
from lightning_januspipe.graph import verify_sharding
from lightning_januspipe.mesh import Mesh, MeshShape, as_world
from lightning_januspipe.runtime.pipeline import MessageDtype, Pipeline
from lightning_januspipe.runtime.planner import Planner, is_deferred, is_unfolded, placements
from lightning_januspipe.runtime.user_step import with_batch
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts


@dataclass(frozen=True)
class CaptureRequest:
    """What a capture is made from.

    Attributes:
        module: the LightningModule.
        step: its training or evaluation step.
        examples: gives two batches of other sizes; called on one rank.
        num_microbatches: of most steps; the cut is chosen for it.
        ready: the contexts that the step is run in, with the module in training mode or as it is.
        trains: whether it is for training.
        evaluation_step: validation_step, where training runs it.
        annotate: gives the context that an action runs in by the action's name, as profilers do; None without one.
    """

    module: Any
    step: Callable[..., Any]
    examples: Callable[[], tuple[Any, Any]]
    num_microbatches: int
    ready: Callable[[bool], AbstractContextManager[None]]
    trains: bool
    evaluation_step: Callable[..., Any] | None = None
    annotate: Callable[[str], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class _Kept:
    """A capture that may serve again, as in a test after training."""

    module: weakref.ref[Any]
    step: str
    capture: Capture

    def serves(self, request: CaptureRequest) -> bool:
        """Whether it is right for a request.

        Training starts with a capture of its own: an earlier one may know nothing of what its step reads. Where steps
        differentiate by themselves, each has a capture of its own too.
        """
        any_step = self.capture.potential.replaced is None
        is_right = self.module() is request.module and (any_step or self.step == _name(request.step))
        return is_right and not request.trains


class PipelineBuilder:
    """Captures modules for one strategy, and keeps the last capture.

    Attributes:
        schedule: name of the schedule.

    Args:
        schedule: name of the schedule.
        wave_size: micro-batches in a wave, or "auto".
        memory_limit: most bytes that the micro-batches of one rank may hold in training, or None.
        potential: dotted name of the potential, where the user gave one.
        stages: where stages come from.
        message_dtype: what messages between stages are rounded to.
    """

    def __init__(
        self,
        schedule: str,
        wave_size: int | Literal["auto"],
        memory_limit: float | None,
        potential: str | None,
        stages: StageOrigin,
        message_dtype: MessageDtype | None = None,
    ) -> None:
        self.schedule, self._wave_size, self._memory_limit = schedule, wave_size, memory_limit
        self._potential, self._stages, self._message_dtype = potential, stages, message_dtype
        self._kept: _Kept | None = None

    def pipeline(
        self, request: CaptureRequest, mesh: Mesh, rank: int, broadcast: Callable[[Any], Any]
    ) -> tuple[Pipeline, str]:
        """This rank's part of the pipeline, and a line about a new capture (empty for one that is used again).

        Args:
            request: what to capture.
            mesh: this rank's process groups.
            rank: this global rank; rank 0 captures.
            broadcast: gives an object of rank 0 to all ranks.

        Raises:
            CaptureError: on every rank, where rank 0 cannot capture.
        """
        num_ranks = mesh.shape.pipeline
        assert mesh.down_group is not None and mesh.up_group is not None
        links = Links(mesh.pipeline_rank, mesh.pipeline_ranks, mesh.down_group, mesh.up_group, mesh.device)
        # One number for all replicas: the stages are placed by it.
        latency = broadcast(message_latency(links))
        news = ""
        to_verify: list[Tensor] = []
        if self._kept is None or not self._kept.serves(request):

            def step_time(costs: list[PhaseCosts]) -> float:
                return self._planner(num_ranks, latency, costs).step_time(request.num_microbatches)

            def capture_in(training: bool) -> tuple[Capture, list[Tensor]]:
                with request.ready(training):
                    examples = request.examples()
                    evaluation, step = request.evaluation_step, with_batch(request.step)
                    with as_world(mesh.alone_group):  # this rank alone runs the step now, with its collectives
                        found = capture_module(
                            request.module,
                            step,
                            *examples,
                            placements(self.schedule, num_ranks),
                            self._potential,
                            phase_mode=PhaseMode(
                                defer=is_deferred(self.schedule), split_stages=is_unfolded(self.schedule)
                            ),
                            step_time=step_time,
                            evaluation_step=None if evaluation is None else with_batch(evaluation),
                            stages=self._stages,
                            cache=ProgramCache.default(),
                        )
                        inputs = _verify_graph_ranks(found, request.module, step, examples[1], mesh.shape.graph)
                        return found, inputs

            def capture() -> tuple[Capture, list[Tensor]]:
                # Many potentials detach their forces in evaluation; some differentiate once only if they are told so.
                try:
                    return capture_in(not request.trains)
                except CaptureError:
                    if request.trains:
                        raise
                return capture_in(False)

            result, to_verify = on_first_rank(capture, rank, broadcast)
            self._kept = _Kept(weakref.ref(request.module), _name(request.step), result)
            manner = manner_in_words(self.schedule, request.num_microbatches, mesh.shape)
            news = f"januspipe: {result.describe()}; {manner}"
        found = self._kept.capture
        # Evaluation keeps nothing between its phases.
        limit = self._memory_limit if request.trains else None
        planner = self._planner(num_ranks, latency, found.costs, found.memory, limit)
        pipeline = Pipeline(request.module, mesh, found, planner, links, request.num_microbatches, self._message_dtype)
        pipeline.executor.annotate = request.annotate
        if to_verify:
            with request.ready(not request.trains):
                # What was received in Lightning's inference mode cannot be differentiated.
                pipeline.verify_sharding([t.clone().to(mesh.device) for t in to_verify])
        return pipeline, news

    def _planner(
        self,
        num_ranks: int,
        latency: float,
        costs: Sequence[PhaseCosts],
        memory: Sequence[MemoryCosts] = (),
        memory_limit: float | None = None,
    ) -> Planner:
        return Planner(
            self.schedule,
            num_ranks,
            tuple(costs),
            tuple(memory),
            self._wave_size,
            memory_limit,
            latency,
        )


def manner_in_words(schedule: str, num_microbatches: int, shape: MeshShape) -> str:
    """How the ranks will work, in words."""
    words = [schedule if shape.pipeline > 1 else "no pipeline"]
    words.append(f"{num_microbatches} micro-batches" if num_microbatches > 1 else "one micro-batch")
    if shape.graph > 1:
        words.append(f"the atoms of each on {shape.graph} ranks")
    if shape.data > 1:
        words.append(f"{shape.data} replicas")
    return ", ".join(words)


def _verify_graph_ranks(capture: Capture, module: Any, step: StepFunction, batch: Any, num_ranks: int) -> list[Tensor]:
    """Verify that a potential can be sharded over graph ranks, as far as one rank can.

    Returns:
        The potential's inputs, on the CPU, where all ranks together have to verify it with them; else nothing.
    """
    if num_ranks == 1:
        return []
    try:
        return [t.detach().cpu() for t in verify_sharding(capture.potential, module, step, batch, num_ranks)]
    except CaptureError as error:
        raise CaptureError(f"{error}{capture.alternative}") from error


def _name(step: Callable[..., Any]) -> str:
    return getattr(step, "__name__", "")
