"""One rank's part of a pipelined module: its stage, its schedule, its parameters. No Lightning in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_januspipe.capture import Capture, CapturedStage, CapturedStep
from lightning_januspipe.capture.step import StepFunction, loss_of, require_finite
from lightning_januspipe.engine.executor import Executor, LossGradients, MicrobatchInput
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.microbatch import fingerprint, same_batch
from lightning_januspipe.engine.p2p import Channel, PipelineError
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.mesh import Mesh, as_world
from lightning_januspipe.schedule import PhaseCosts, Schedule, build_schedule


class Undivided:
    """The whole module on one rank: gradient accumulation over the micro-batches, nothing captured.

    Args:
        module: the LightningModule.
        mesh: this rank's process groups.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.gradients = GradientBuffers()
        self._module, self._mesh = module, mesh

    def train_step(self, steps: Sequence[StepFunction], batches: Sequence[Any]) -> list[Any]:
        """Run the user's step on every micro-batch; gradients end in ``gradients``.

        Args:
            steps: the user's training step for each micro-batch, from a batch to what it returns.
            batches: the micro-batches.

        Returns:
            What the steps returned.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        outputs = []
        for index, (step, batch) in enumerate(zip(steps, batches, strict=True)):
            with as_world(self._mesh.data_group):
                output = step(batch)
            loss = loss_of(output, type(self._module).__name__)
            require_finite(loss, index)
            parameters = [p for p in self._module.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss / len(batches), parameters, allow_unused=True)
            self.gradients.add(parameters, found)
            outputs.append(output)
        return outputs

    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """The user's step of evaluation."""
        with as_world(self._mesh.data_group):
            return step(batch)

    def reduce(self) -> None:
        """Average the published gradients over the replicas."""
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            reduce_gradients(self._module.parameters(), self._mesh.data_group, divide_by=self._mesh.shape.data)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this rank trains a parameter: all of them."""
        return True

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts a parameter in norms and checkpoints: all of them."""
        return True


class Pipeline:
    """One stage of a captured module, on one rank.

    Args:
        module: the LightningModule, whole on every rank.
        mesh: this rank's process groups.
        capture: the captured potential, the same on all ranks.
        schedule: name of the schedule.
        wave_size: micro-batches in a wave, or "auto".
    """

    def __init__(
        self, module: nn.Module, mesh: Mesh, capture: Capture, schedule: str, wave_size: int | str = "auto"
    ) -> None:
        self.gradients = GradientBuffers()
        self.capture = capture
        self._module, self._mesh = module, mesh
        self._schedule_name, self._wave_size = schedule, wave_size
        self._schedules: dict[int, Schedule] = {}
        captured = capture.potential
        potential = module.get_submodule(captured.path)
        function = CapturedStage(captured, mesh.pipeline_rank, potential)
        self.step = CapturedStep(captured, module, self._add_outside)
        assert mesh.down_group is not None and mesh.up_group is not None
        down = self._channel(mesh.down_group, 1), self._channel(mesh.down_group, -1)
        up = self._channel(mesh.up_group, -1), self._channel(mesh.up_group, 1)
        self.executor = Executor(
            Stage(function, self.gradients), captured.chain, mesh.shape.pipeline, down, up, mesh.device, mesh.timeout
        )
        self._trainable = {n for n, p in module.named_parameters() if p.requires_grad}
        self.stages_of = self._place(captured.parameter_stages(), dict(potential.named_parameters()))

    def schedule(self, num_microbatches: int) -> Schedule:
        """The schedule for a number of micro-batches, the same on every rank."""
        if num_microbatches not in self._schedules:
            costs = tuple(PhaseCosts(s.fe, s.ff, s.bf, s.be) for s in self.capture.seconds)
            self._schedules[num_microbatches] = build_schedule(
                self._schedule_name, len(costs), num_microbatches, costs, wave_size=self._wave_size
            )
        return self._schedules[num_microbatches]

    def train_step(self, steps: Sequence[StepFunction], batches: Sequence[Any]) -> list[Any]:
        """All four phases of all micro-batches; see :meth:`Undivided.train_step`.

        Raises:
            PipelineError: the ranks hold different batches, or a rank has ended.
            FloatingPointError: a loss is not finite.
        """
        outputs: list[Any] = [None] * len(batches)
        self._refuse_unfreezing()
        try:
            inputs = [self._prepare(i, s, b) for i, (s, b) in enumerate(zip(steps, batches, strict=True))]
            self._compare_batches(inputs, batches)
            schedule = self.schedule(len(batches))

            def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
                with as_world(self._mesh.data_group):
                    result = self.step.loss(
                        index, steps[index], batches[index], 1 / len(batches), observables, derivatives
                    )
                outputs[index] = result.output
                return result.gradients

            self.executor.run(schedule, inputs, loss)
        except BaseException:
            self._abort()
            raise
        finally:
            self.step.clear()
        return outputs

    def evaluate_step(self, step: StepFunction, batch: Any) -> Any:
        """FE and FF of one batch, then the user's step on every rank."""
        try:
            inputs = [self._prepare(0, step, batch)]
            self._compare_batches(inputs, [batch])
            ((observables, derivatives),) = self.executor.evaluate(inputs)
            for derivative in derivatives:
                dist.broadcast(derivative, self._mesh.pipeline_ranks[0], group=self._mesh.pipeline_group)
            with as_world(self._mesh.data_group):
                return self.step.finish(0, step, batch, observables, derivatives)
        except BaseException:
            self._abort()
            raise
        finally:
            self.step.clear()

    def _abort(self) -> None:
        """This rank cannot go on: the others must not wait for it, even if its process lives on."""
        self.executor.close()
        self._mesh.abort()

    def reduce(self) -> None:
        """Sum the gradients of parameters that several stages read, then average over the replicas."""
        shared = [p for p, stages in self.stages_of.items() if len(stages) > 1]
        assert self._mesh.pipeline_group is not None
        reduce_gradients(shared, self._mesh.pipeline_group)
        for parameter in shared:
            if not self.holds(parameter):
                parameter.grad = None
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            held = [p for p in self.stages_of if self.holds(p)]
            reduce_gradients(held, self._mesh.data_group, divide_by=self._mesh.shape.data)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether this rank trains a parameter."""
        return self._mesh.pipeline_rank in self.stages_of.get(parameter, ())

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts a parameter in norms and checkpoints: each is owned once in a pipeline."""
        return self.owner(parameter) == self._mesh.pipeline_rank

    def owner(self, parameter: nn.Parameter) -> int:
        """The first stage that holds a parameter."""
        return min(self.stages_of[parameter])

    def synchronize(self) -> None:
        """Bring all parameters up to date on every rank, from their owners."""
        by_owner: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
        for parameter in self.stages_of:
            by_owner.setdefault((self.owner(parameter), parameter.dtype), []).append(parameter)
        for (stage, _), parameters in by_owner.items():
            flat = torch.cat([p.detach().reshape(-1) for p in parameters])
            dist.broadcast(flat, self._mesh.pipeline_ranks[stage], group=self._mesh.pipeline_group)
            for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.data.copy_(values.view_as(p))

    def _channel(self, group: dist.ProcessGroup, step: int) -> Channel | None:
        peer = self._mesh.neighbour(step)
        return None if peer is None else Channel(group, peer, self._mesh.device)

    def _place(self, captured: dict[str, set[int]], inside: dict[str, nn.Parameter]) -> dict[nn.Parameter, set[int]]:
        """The stages that hold each parameter; those outside the potential, and those it never reads, are held by all.

        Every rank evaluates the loss, so every rank needs the parameters that it reads.
        """
        everywhere = set(range(self._mesh.shape.pipeline))
        stages = {inside[name]: set(found) for name, found in captured.items() if found}
        return {p: stages.get(p, everywhere) for p in self._module.parameters()}

    def _add_outside(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
        if self._mesh.pipeline_rank == 0:
            self.gradients.add(parameters, gradients)

    def _prepare(self, index: int, step: StepFunction, batch: Any) -> MicrobatchInput:
        with as_world(self._mesh.alone_group):
            return self.step.prepare(index, step, batch)

    def _refuse_unfreezing(self) -> None:
        changed = self._trainable ^ {n for n, p in self._module.named_parameters() if p.requires_grad}
        if changed:
            raise ValueError(
                f"requires_grad of {', '.join(sorted(changed)[:3])} was changed after training had started, when the "
                "stages were made. Freeze and unfreeze before Trainer.fit, or train with pipeline_size=1."
            )

    def _compare_batches(self, inputs: Sequence[MicrobatchInput], batches: Sequence[Any]) -> None:
        """Refuse to go on if the ranks of this pipeline hold different batches: nothing else would notice."""
        labels = [[x for x in pytree.tree_leaves(b) if isinstance(x, Tensor)] for b in batches]
        mine = [fingerprint([*i.tensors, *more]) for i, more in zip(inputs, labels, strict=True)]
        found: list[Any] = [None] * self._mesh.shape.pipeline
        dist.all_gather_object(found, mine, group=self._mesh.control_group)
        for stage, other in enumerate(found):
            same = len(other) == len(found[0]) and all(map(same_batch, found[0], other))
            if not same:
                first, second = self._mesh.pipeline_ranks[0], self._mesh.pipeline_ranks[stage]
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
