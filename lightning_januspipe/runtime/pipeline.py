"""One rank's part of a pipelined module: its stages, its schedule, its parameters. No Lightning in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_januspipe.capture import Capture, StagedPotential
from lightning_januspipe.capture.find.grad_call import StepFunction
from lightning_januspipe.capture.validate.side_effects import unchanged
from lightning_januspipe.checkpoint.averages import followers, held_by_all
from lightning_januspipe.distributed import on_first_rank
from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.p2p import Links, message_latency, pack, packed_size, unpack
from lightning_januspipe.engine.route import evaluation_schedule
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.engine.timeline import MeanPhaseTimes, Span, recorded_report
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.graph import GraphAxis, GraphGroup, Replica, verify_explicit_sharding
from lightning_januspipe.mesh import Mesh, as_world
from lightning_januspipe.runtime.batch_checks import BatchChecks
from lightning_januspipe.runtime.fingerprint import fingerprint, same_batch
from lightning_januspipe.runtime.planner import Planner, is_searched, measured_costs
from lightning_januspipe.runtime.step_recorder import RecordedStep, StepRecorder
from lightning_januspipe.runtime.user_step import CapturedStep
from lightning_januspipe.schedule import Schedule

_Result = TypeVar("_Result")

MessageDtype = Literal["bf16"]
"""What messages may be rounded to."""

# The first step warms up; costs are measured in those after it.
_LEARNING_STEPS = (1, 2, 3)


class Pipeline:
    """The stages of a captured module that one rank runs.

    Args:
        module: the LightningModule, whole on every rank.
        mesh: this rank's process groups.
        capture: the captured potential, the same on all ranks.
        planner: builds schedules; that of the pipeline's first rank decides.
        num_microbatches: of most steps; the ranks of the stages are chosen for it.
        message_dtype: what features and their gradients are rounded to between ranks; None for what they are.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        capture: Capture,
        planner: Planner,
        num_microbatches: int = 1,
        message_dtype: MessageDtype | None = None,
    ) -> None:
        self.gradients = GradientBuffers()
        self.capture = capture
        self._module, self._mesh, self._planner = module, mesh, planner
        self._costs = planner.costs
        self._schedules: dict[int, Schedule] = {}
        captured = capture.potential
        potential = module.get_submodule(captured.path)
        first = self.schedule(num_microbatches)
        self._placement, self._force_placement = first.placement, first.force_placement
        self._planner = replace(planner, placement=self._placement)
        self._evaluation = evaluation_schedule(self._placement, self._force_placement, mesh.shape.pipeline, 1)
        self.batch_checks = BatchChecks(captured, module)
        self.step = CapturedStep(captured, module, self._add_outside, self.batch_checks.note)
        links = _links(mesh)
        links.connect(first.messages())
        self._graph = _graph_axis(captured, potential, mesh)
        divided = captured if self._graph is None else self._graph.potential
        own = first.stages_of(mesh.pipeline_rank)
        stages = {s: Stage(divided.stage(s, potential), self.gradients, divided.chain.autocast) for s in own}
        sent_as = torch.bfloat16 if message_dtype == "bf16" else None
        self.executor = Executor(mesh.pipeline_rank, stages, captured.chain, links, mesh.device, mesh.timeout, sent_as)
        self.step_recorder = StepRecorder(mesh.device, self.gradients)
        self._costs_then = self._costs
        self._times = MeanPhaseTimes()
        self._links, self._bytes_before = links, links.bytes_sent
        self._num_steps = 0
        self._trainable = {n for n, p in module.named_parameters() if p.requires_grad}
        self.ranks_of = self._place(captured.parameter_stages(), dict(potential.named_parameters()))

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank's stages have sent to other ranks so far."""
        return self._links.bytes_sent - self._bytes_before

    @property
    def num_stages(self) -> int:
        """Length of the chain."""
        return len(self._placement)

    @property
    def placement(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return tuple(self._placement)

    def schedule(self, num_microbatches: int) -> Schedule:
        """The schedule for a number of micro-batches; all ranks of the pipeline have to ask for it.

        The first rank builds it and the others take it over, so that there is one whatever each has measured.
        """
        if num_microbatches not in self._schedules:
            found = self._agree(lambda: self._planner.schedule(num_microbatches))
            assert not self._schedules or self._is_placed(found), "the stages of a pipeline stay on their ranks"
            self._schedules[num_microbatches] = found
        return self._schedules[num_microbatches]

    def _is_placed(self, schedule: Schedule) -> bool:
        return (schedule.placement, schedule.force_placement) == (self._placement, self._force_placement)

    def train_step(
        self,
        steps: Sequence[StepFunction],
        batches: Sequence[Any],
        loss_scale: float = 1.0,
        ahead: Sequence[Tensor | None] = (),
    ) -> list[Any]:
        """Run all phases of all micro-batches; see :meth:`.SingleStage.train_step`.

        Raises:
            PipelineError: the ranks hold different batches, or a rank has ended.
            FloatingPointError: a loss is not finite.
        """
        outputs: list[Any] = [None] * len(batches)
        self._refuse_unfreezing()
        try:
            inputs = [self._prepare(i, s, b) for i, (s, b) in enumerate(zip(steps, batches, strict=True))]
            self._compare_batches(inputs, batches)
            self._run_batch_checks()
            inputs = self._divided(inputs, ahead)
            schedule = self.schedule(len(batches))

            def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
                if self._graph is not None:
                    observables, derivatives = self._graph.gather_results(index, observables, derivatives)
                with as_world(self._mesh.data_group):
                    result = self.step.loss(
                        index, steps[index], batches[index], loss_scale / len(batches), observables, derivatives
                    )
                outputs[index] = result.output
                return result.gradients if self._graph is None else self._graph.own_gradients(index, result.gradients)

            self._costs_then = self._costs if self.step_recorder.wants_times else self._costs_then
            is_learning = self._num_steps in _LEARNING_STEPS
            with self.step_recorder.step(schedule, lambda: self.executor.bytes_sent, is_learning) as recorder:
                self.executor.recorder = recorder
                self.executor.run(schedule, inputs, loss)
            self.executor.recorder = None
            if is_learning and recorder is not None:
                self._learn(schedule, recorder.spans())
            self._num_steps += 1
        except BaseException:
            self._abort()
            raise
        finally:
            self._clear()
        return outputs

    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """FE and FF of one batch, then the user's step on every rank."""
        try:
            inputs = [self._prepare(0, step, batch)]
            self._compare_batches(inputs, [batch])
            self._run_batch_checks()
            inputs = self._divided(inputs)
            (result,) = self.executor.evaluate(self._evaluation, inputs)
            observables, derivatives = self._share(result, inputs[0])
            if self._graph is not None:
                observables, derivatives = self._graph.gather_results(0, observables, derivatives)
            with as_world(self._mesh.data_group):
                return self.step.finish(0, step, batch, observables, derivatives)
        except BaseException:
            self._abort()
            raise
        finally:
            self._clear()

    def verify_sharding(self, tensors: Sequence[Tensor]) -> None:
        """Verify on all graph ranks together that sharding is right; see :func:`.verify_explicit_sharding`.

        Args:
            tensors: inputs of the potential, the same on all ranks.

        Raises:
            CaptureError: the divided potential computes something else than the whole one.
        """
        captured = self.capture.potential
        assert self._graph is not None
        try:
            with unchanged(self._module):
                verify_explicit_sharding(self._graph, captured, self._module.get_submodule(captured.path), tensors)
        except BaseException:
            self._abort()
            raise
        finally:
            self._graph.clear()

    def _divided(self, inputs: list[MicrobatchInput], ahead: Sequence[Tensor | None] = ()) -> list[MicrobatchInput]:
        if self._graph is None:
            return inputs
        mesh = self._mesh
        assert mesh.replica_group is not None
        replica = Replica(len(mesh.replica_ranks), mesh.replica_rank, mesh.replica_group)
        return self._graph.shard_step_inputs(inputs, replica, ahead)

    def _clear(self) -> None:
        self.step.clear()
        if self._graph is not None:
            self._graph.clear()

    def _share(
        self, result: tuple[list[Tensor], list[Tensor]] | None, given: MicrobatchInput
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Energies and forces of the rank that has them, on all ranks of the pipeline."""
        chain = self.executor.chain
        shapes = [(s.sizes(given.symbols), s.dtype) for s in (*chain.observables, *chain.coordinates)]
        if result is not None:
            buffer = pack([*result[0], *result[1]])
        else:
            buffer = torch.empty(packed_size(shapes), dtype=torch.uint8, device=self._mesh.device)
        dist.broadcast(buffer, self._mesh.pipeline_ranks[self._force_placement[0]], group=self._mesh.pipeline_group)
        tensors = unpack(buffer, shapes)
        return tensors[: len(chain.observables)], tensors[len(chain.observables) :]

    def _abort(self) -> None:
        """This rank cannot go on: the others must not wait for it, even if its process lives on."""
        self.executor.close()
        if self._graph is not None:
            self._graph.close()
        self._mesh.abort()

    def _agree(self, build: Callable[[], _Result]) -> _Result:
        """What the first rank of a replica builds, or its error, on every rank of it."""
        first = self._mesh.replica_ranks[0]

        def broadcast(result: Any) -> Any:
            found = [result]
            dist.broadcast_object_list(found, first, group=self._mesh.replica_group)
            return found[0]

        return on_first_rank(build, self._mesh.rank - first, broadcast)

    # -- what a step costs -------------------------------------------------------------------------------------------

    def record_next_step(self) -> None:
        """Record the next training step for :meth:`recorded_step`; all ranks of the pipeline have to be asked."""
        self.step_recorder.ask()

    def recorded_step(self) -> RecordedStep | None:
        """The last step that was recorded, None where there is none; all ranks of the pipeline have to call this."""
        own = self.step_recorder.rank_step
        if own is None:
            return None
        assert own.schedule is not None
        predicted = replace(self._planner, costs=self._costs_then).report(own.schedule)
        of_ranks = dict(enumerate(self._gathered(own.spans)))
        return RecordedStep(own.schedule, predicted, recorded_report(own.schedule, of_ranks))

    def _learn(self, schedule: Schedule, spans: Sequence[Span]) -> None:
        self._times.add(spans)
        if self._num_steps == _LEARNING_STEPS[-1]:
            self._plan_again(schedule)

    def _plan_again(self, schedule: Schedule) -> None:
        """Plan for what the phases take on these ranks, with this data, and the user's loss.

        Other schedules than the searched ones keep the costs of the start, by which their stages were placed.
        """
        means = {key: time for of_rank in self._gathered(self._times.means()) for key, time in of_rank.items()}
        self._costs = costs = self._of_first_replica(measured_costs(means, schedule))
        if is_searched(self._planner.name):
            better = self._agree(lambda: self._planner.improved(schedule, costs))
            self._schedules = {schedule.num_microbatches: better or schedule}
            self._planner = replace(self._planner, costs=costs)

    def _of_first_replica(self, mine: _Result) -> _Result:
        """Replicas run one order: losses with collectives meet in the order of their micro-batches."""
        found = [mine]
        dist.broadcast_object_list(found, 0, group=self._mesh.host_group)
        return found[0]

    def _gathered(self, mine: _Result) -> list[_Result]:
        found: list[Any] = [None] * self._mesh.shape.pipeline
        dist.all_gather_object(found, mine, group=self._mesh.control_group)
        return found

    def reduce(self) -> None:
        """Sum the gradients of parameters that several ranks hold, over the graph ranks too; average over replicas."""
        shared = [p for p, ranks in self.ranks_of.items() if len(ranks) > 1]
        assert self._mesh.pipeline_group is not None
        reduce_gradients(shared, self._mesh.pipeline_group)
        for parameter in shared:
            if not self.holds(parameter):
                parameter.grad = None
        held = [p for p in self.ranks_of if self.holds(p)]
        if self._mesh.graph_group is not None:
            reduce_gradients(held, self._mesh.graph_group)
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            reduce_gradients(held, self._mesh.data_group, divide_by=self._mesh.shape.data)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this rank trains a parameter."""
        return self._mesh.pipeline_rank in self.ranks_of.get(parameter, ())

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts a parameter in norms and checkpoints: each is owned once in a pipeline."""
        return self.owner(parameter) == self._mesh.pipeline_rank

    def owner(self, parameter: nn.Parameter) -> int:
        """The first rank of the pipeline that holds a parameter."""
        return min(self.ranks_of[parameter])

    def synchronize(self, holders: Sequence[object] = (), averages_only: bool = False) -> None:
        """Bring all parameters, and averages of them, up to date on every rank, from their owners.

        Args:
            holders: objects beside the module that may hold averages, such as callbacks.
            averages_only: leave the parameters themselves as they are.
        """
        owners: dict[Tensor, int] = {} if averages_only else {p: self.owner(p) for p in self.ranks_of}
        owners.update((t, self.owner(p)) for p, t in self.followers(holders))
        by_owner: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for tensor, rank in owners.items():
            by_owner.setdefault((rank, tensor.dtype), []).append(tensor)
        for (rank, _), tensors in by_owner.items():
            flat = torch.cat([t.detach().reshape(-1).to(self._mesh.device) for t in tensors])
            dist.broadcast(flat, self._mesh.pipeline_ranks[rank], group=self._mesh.pipeline_group)
            for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.data.copy_(values.view_as(tensor))

    def followers(self, holders: Sequence[object] = ()) -> list[tuple[nn.Parameter, Tensor]]:
        """Averages of parameters that single ranks train, which all ranks hold; every rank of the pipeline takes part.

        Args:
            holders: objects beside the module that may hold averages, such as callbacks.
        """
        partly = self.partly_held()
        found = followers(self._module, holders, partly)
        common = held_by_all(self._gathered(list(found)), len(partly))
        return [pair for place, pair in found.items() if place in common]

    def partly_held(self) -> list[nn.Parameter]:
        """Parameters that only some ranks of the pipeline train."""
        return [p for p, ranks in self.ranks_of.items() if len(ranks) < self._mesh.shape.pipeline]

    def _place(self, captured: dict[str, set[int]], inside: dict[str, nn.Parameter]) -> dict[nn.Parameter, set[int]]:
        """The ranks that hold each parameter; those outside the potential, and those it never reads, are held by all.

        Every rank evaluates the loss, so every rank needs the parameters that it reads.
        """
        everywhere = set(range(self._mesh.shape.pipeline))
        ranks: dict[nn.Parameter, set[int]] = {}
        for name, stages in captured.items():
            ranks[inside[name]] = {place[s] for s in stages for place in (self._placement, self._force_placement)}
        return {p: ranks.get(p) or everywhere for p in self._module.parameters()}

    def _add_outside(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
        if self._mesh.rank == self._mesh.replica_ranks[0]:
            self.gradients.add(parameters, gradients)

    def _prepare(self, index: int, step: StepFunction, batch: Any) -> MicrobatchInput:
        with as_world(self._mesh.alone_group):
            return self.step.prepare(index, step, batch)

    def _run_batch_checks(self) -> None:
        with as_world(self._mesh.alone_group):
            self.batch_checks.run()

    def _refuse_unfreezing(self) -> None:
        changed = self._trainable ^ {n for n, p in self._module.named_parameters() if p.requires_grad}
        if changed:
            raise ValueError(
                f"requires_grad of {', '.join(sorted(changed)[:3])} was changed after training had started, when the "
                "stages were made. Freeze and unfreeze before Trainer.fit, or train with "
                "pipeline_size=1 and graph_size=1."
            )

    def _compare_batches(self, inputs: Sequence[MicrobatchInput], batches: Sequence[Any]) -> None:
        """Refuse to go on if the ranks of this replica hold different batches: nothing else would notice."""
        labels = [[x for x in pytree.tree_leaves(b) if isinstance(x, Tensor)] for b in batches]
        mine = [fingerprint([*i.tensors, *more]) for i, more in zip(inputs, labels, strict=True)]
        found: list[Any] = [None] * len(self._mesh.replica_ranks)
        try:
            dist.all_gather_object(found, mine, group=self._mesh.replica_group)
        except RuntimeError as error:
            # Without the frames of torch, which refer to the group: this rank's connections have to close in turn.
            raise PipelineError(
                f"global rank {self._mesh.rank} could not compare its batch with those of the other ranks of its "
                f"pipeline: {error}. One of them has ended or hangs; its own output has the cause."
            ) from error.with_traceback(None)
        for rank, other in enumerate(found):
            same = len(other) == len(found[0]) and all(map(same_batch, found[0], other))
            if not same:
                first, second = self._mesh.replica_ranks[0], self._mesh.replica_ranks[rank]
                index = next(
                    (i for i, (a, b) in enumerate(zip(found[0], other, strict=False)) if not same_batch(a, b)), 0
                )
                raise PipelineError(
                    f"global ranks {first} and {second} of one pipeline got different batches (micro-batch {index}: "
                    f"{found[0][index : index + 1]} and {other[index : index + 1]}, as number of tensors, numbers, "
                    f"checksum; {len(found[0])} and {len(other)} micro-batches). All ranks of a pipeline have to "
                    "see the same samples: keep Trainer(use_distributed_sampler=True), or seed your sampler "
                    "and your random transforms alike on every rank (lightning.seed_everything(..., workers=True))."
                )


def _graph_axis(captured: StagedPotential, potential: nn.Module, mesh: Mesh) -> GraphAxis | None:
    if mesh.graph_group is None:
        return None
    return GraphAxis(captured, potential, GraphGroup(mesh.shape.graph, mesh.graph_rank, mesh.graph_group))


def measured_latency(mesh: Mesh) -> float:
    """Seconds that a message between two ranks of the pipeline takes; every rank gets that of the first rank."""
    if mesh.shape.pipeline == 1:
        return 0.0
    found = [message_latency(_links(mesh), mesh.pipeline_rank)]
    dist.broadcast_object_list(found, mesh.replica_ranks[0], group=mesh.replica_group)
    return found[0]


def _links(mesh: Mesh) -> Links:
    assert mesh.down_group is not None and mesh.up_group is not None
    return Links(mesh.pipeline_rank, mesh.pipeline_ranks, mesh.down_group, mesh.up_group, mesh.device)
