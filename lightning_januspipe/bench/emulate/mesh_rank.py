"""What each rank of an emulated mesh does: a pipeline's actions, exchanges of graph ranks, the replicas' all-reduce."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.bench.emulate.emulated_stage import (
    EmulatedSplitStage,
    EmulatedStage,
    EmulationError,
    emulated_chain,
)
from lightning_januspipe.bench.emulate.rank import check_order, common_start, no_garbage_collection, step_data, urgently
from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.gradients import reduce_gradients
from lightning_januspipe.engine.timeline import ActionRecorder, Span
from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.runtime.build import pipeline_links
from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.costs import Costs, action_times

_CPU = torch.device("cpu")
_GRADIENT = 64  # entries


@dataclass(frozen=True)
class MicrobatchWork:
    """How the work of one micro-batch is shared by the G graph ranks of every stage.

    Attributes:
        loads: (G,) how long each rank's part takes, in those of the costs.
        is_divided: whether structures are divided, so that the ranks exchange something in every phase; else they are
            dealt whole, and nothing is exchanged.
    """

    loads: tuple[float, ...]
    is_divided: bool = False


MeshWork = Sequence[Sequence[MicrobatchWork]]
"""The micro-batches of every replica, in one step."""


@dataclass(frozen=True)
class MeshRecord:
    """What one rank measured, for every step. Times are in seconds after the common start of all ranks.

    Attributes:
        actions: the rank's actions as they ran.
        exchanges: the actions in which graph ranks met, with the time that this took.
        reductions: start and end of the reduction of gradients.
        cpu: seconds that the rank's process computed, all threads together.
        urgent: whether the rank ran before other programs; one entry for all steps.
    """

    actions: list[list[Span]] = field(default_factory=list)
    exchanges: list[list[Span]] = field(default_factory=list)
    reductions: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    urgent: list[bool] = field(default_factory=list)


class GraphExchange:
    """The exchanges of a rank with the other graph ranks of its stage: who they are is checked, and what they do.

    Args:
        group: the graph ranks of this rank's stage and replica.

    Attributes:
        work: the micro-batches of this rank's replica.
        spans: actions that exchanged, with ``time.perf_counter()`` before and after.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.work: Sequence[MicrobatchWork] = ()
        self.spans: list[Span] = []
        self._group: dist.ProcessGroup | None = group

    def __call__(self, action: Action, serial: int) -> None:
        """One small message to and from every graph rank, if the micro-batch is divided.

        Args:
            action: what this rank is about to do.
            serial: the micro-batch's number, which no other one has.

        Raises:
            EmulationError: another graph rank does something else.
        """
        if not self.work[action.microbatch].is_divided:
            return
        assert self._group is not None
        rank, size = self._group.rank(), self._group.size()
        began = time.perf_counter()
        what = [float(serial), float(list(Phase).index(action.phase)), float(action.stage)]
        came = torch.empty(size, len(what) + 1, dtype=torch.float64)
        dist.all_to_all_single(came, torch.tensor([[*what, rank]] * size, dtype=torch.float64), group=self._group)
        self.spans.append(Span(action, began, time.perf_counter()))
        if came.tolist() != [[*what, other] for other in range(size)]:
            raise EmulationError(
                f"{action} of graph rank {rank} met graph ranks that say {came.tolist()}; expected {what} (serial "
                "number of the micro-batch, phase, stage) of each, and its rank: they run other actions"
            )

    def close(self) -> None:
        """Let go of the group."""
        self._group = None


def emulate_mesh_rank(
    shape: MeshShape,
    schedule: Schedule,
    costs: Costs,
    steps: Sequence[MeshWork],
    message_bytes: int,
    timeout: timedelta,
) -> MeshRecord:
    """What every rank does: connect, run the first step without sleeping, then all steps with it.

    Args:
        shape: of the mesh.
        schedule: what every pipeline runs.
        costs: times of the phases in seconds, of a micro-batch with load 1.
        steps: what there is to do.
        message_bytes: bytes of the boundary between two stages.
        timeout: how long to wait for another rank.
    """
    dist.init_process_group("gloo", timeout=timeout)
    mesh = Mesh(shape, dist.get_rank(), _CPU, timeout)
    rank = _MeshRank(mesh, schedule, costs, message_bytes, timeout)
    try:
        return rank.run(steps)
    except BaseException:
        rank.close()
        mesh.abort()
        raise


class _MeshRank:
    """The executor of one rank, with its stages and what they share."""

    def __init__(
        self, mesh: Mesh, schedule: Schedule, costs: Costs, message_bytes: int, timeout: timedelta | None
    ) -> None:
        self._mesh, self._schedule = mesh, schedule
        spec, functions = emulated_chain(schedule.num_stages, message_bytes)
        times = action_times(schedule, costs)
        self._ran: list[Action] = []
        self._stages: dict[int, EmulatedStage] = {}
        for s in schedule.stages_of(mesh.pipeline_rank):
            seconds = {phase: times(phase, s) for phase in Phase}
            kind = EmulatedSplitStage if schedule.is_split(s) else EmulatedStage
            self._stages[s] = kind(functions[s], schedule.num_stages, seconds, self._ran)
        links = pipeline_links(mesh) if mesh.shape.size > 1 else None
        self._executor = Executor(mesh.pipeline_rank, self._stages, spec, links, timeout)
        self._executor.recorder = self._recorder = ActionRecorder(_CPU)
        self._exchange = None if mesh.graph_group is None else GraphExchange(mesh.graph_group)
        self._gradient = nn.Parameter(torch.zeros(_GRADIENT, dtype=torch.float64))
        for stage in self._stages.values():
            stage.meet = self._exchange

    def close(self) -> None:
        """Let go of all connections: ranks that wait for this one are told at once that it will not answer."""
        self._executor.close()
        if self._exchange is not None:
            self._exchange.close()

    def run(self, steps: Sequence[MeshWork]) -> MeshRecord:
        """All steps, after the first one without sleeping."""
        record = MeshRecord()
        with no_garbage_collection(), urgently() as urgent:
            record.urgent.append(urgent)
            for number, work in enumerate([steps[0], *steps]):
                mine = work[self._mesh.data_rank]
                loads = [entry.loads[self._mesh.graph_rank] for entry in mine]
                self._step(number, mine, loads if number else [0.0] * len(loads), record)
        self.close()
        return record

    def _step(self, number: int, mine: Sequence[MicrobatchWork], loads: Sequence[float], record: MeshRecord) -> None:
        """One step; the first, number 0, is not recorded."""
        mesh = self._mesh
        spans: list[Span] = []
        for stage in self._stages.values():
            stage.weights = loads
        if self._exchange is not None:
            self._exchange.work, self._exchange.spans = mine, (spans := [])
        inputs, loss = step_data(self._schedule, number * mesh.shape.data + mesh.data_rank)
        self._ran.clear()
        self._gradient.grad = self._own_gradient(number, mesh.rank)
        start = common_start()
        self._recorder.reset()
        before = time.process_time()
        self._executor.run(self._schedule, inputs, loss)
        began = time.perf_counter()
        self._reduce()
        ended, used = time.perf_counter(), time.process_time() - before
        self._check_gradient(number)
        shift = self._recorder.began - start
        ran = [Span(span.action, span.start + shift, span.end + shift) for span in self._recorder.spans()]
        check_order(mesh.rank, self._ran, self._schedule.actions[mesh.pipeline_rank])
        check_order(mesh.rank, [span.action for span in ran], self._ran)
        if number:
            record.actions.append(ran)
            record.exchanges.append([Span(s.action, s.start - start, s.end - start) for s in spans])
            record.reductions.append((began - start, ended - start))
            record.cpu.append(used)

    def _reduce(self) -> None:
        """As a pipeline does: the sum over graph ranks, the mean over replicas."""
        if self._mesh.graph_group is not None:
            reduce_gradients([self._gradient], self._mesh.graph_group)
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            reduce_gradients([self._gradient], self._mesh.data_group, divide_by=self._mesh.shape.data)

    @staticmethod
    def _own_gradient(number: int, rank: int) -> Tensor:
        """What one rank contributes in a step."""
        return torch.full((_GRADIENT,), float(1000 * number + (rank + 1) ** 2), dtype=torch.float64)

    def _check_gradient(self, number: int) -> None:
        shape, found = self._mesh.shape, self._gradient.grad
        peers = [shape.rank(self._mesh.pipeline_rank, d, g) for d in range(shape.data) for g in range(shape.graph)]
        expected = torch.stack([self._own_gradient(number, rank) for rank in peers]).sum(0) / shape.data
        assert found is not None
        if not torch.allclose(found, expected):
            raise EmulationError(
                f"rank {self._mesh.rank} has the gradient {float(found[0])} after its reduction, expected "
                f"{float(expected[0])}, the sum over graph ranks and the mean over replicas"
            )
