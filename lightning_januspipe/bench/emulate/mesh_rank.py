"""Runs one rank of an emulated mesh: its actions, its exchanges with graph ranks, the reduction over replicas."""

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
    emulated_stages,
)
from lightning_januspipe.bench.emulate.emulated_state import EmulatedState
from lightning_januspipe.bench.emulate.rank import (
    check_order,
    common_start,
    message_latencies,
    no_garbage_collection,
    step_data,
    urgently,
)
from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.gradients import reduce_gradients
from lightning_januspipe.engine.timeline import ActionRecorder, Span
from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.runtime.build_pipeline import pipeline_links
from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.actions import COMPUTED_PHASES
from lightning_januspipe.schedule.costs import Costs, State, action_times, state_per_stage

_CPU = torch.device("cpu")
_GRADIENT = 64  # entries


@dataclass(frozen=True)
class MicrobatchWork:
    """Holds the share of each of the G graph ranks of every stage in one micro-batch.

    Attributes:
        loads: (G,) Factors of the phase times on each rank.
        is_sharded: Whether atoms of one structure are on several ranks, so that the ranks exchange rows in every phase.
            Otherwise structures are dealt whole, and nothing is exchanged.
    """

    loads: tuple[float, ...]
    is_sharded: bool = False


MeshWork = Sequence[Sequence[MicrobatchWork]]
"""The micro-batches of every replica, in one step."""


@dataclass(frozen=True)
class MeshRecord:
    """Holds one rank's measurements of every step. Times are in seconds after the common start of all ranks.

    Attributes:
        actions: The rank's actions as they ran.
        exchanges: The times of exchanges with graph ranks, by action.
        reductions: Start and end of the reduction of gradients.
        latencies: Seconds from the sending to the arrival of each of some messages, before the first step.
        cpu: Seconds that the rank's process computed, all threads together.
        urgent: Whether the rank ran with priority over other programs; one entry for all steps.
    """

    actions: list[list[Span]] = field(default_factory=list)
    exchanges: list[list[Span]] = field(default_factory=list)
    reductions: list[tuple[float, float]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    urgent: list[bool] = field(default_factory=list)


class GraphExchange:
    """Makes the exchanges of a rank with the other graph ranks of its stage, and checks that all run the same action.

    Args:
        group: The graph ranks of this rank's stage and replica.

    Attributes:
        work: The micro-batches of this rank's replica.
        spans: Actions that exchanged, with ``time.perf_counter()`` before and after.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.work: Sequence[MicrobatchWork] = ()
        self.spans: list[Span] = []
        self._group: dist.ProcessGroup | None = group

    def __call__(self, action: Action, serial: int) -> None:
        """Sends a small message to every graph rank and receives one, if the micro-batch is sharded.

        Args:
            action: The action that this rank is about to run.
            serial: The micro-batch's serial number, which no other micro-batch has.

        Raises:
            EmulationError: Another graph rank runs another action.
        """
        if not self.work[action.microbatch].is_sharded:
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
        """Drops the group."""
        self._group = None


def emulate_mesh_rank(
    shape: MeshShape,
    schedule: Schedule,
    costs: Costs,
    steps: Sequence[MeshWork],
    message_bytes: int,
    timeout: timedelta,
    state: State | None = None,
) -> MeshRecord:
    """Connects a rank, runs the first step without sleeping, then all steps with it.

    Args:
        shape: Sizes of the mesh.
        schedule: The schedule that every pipeline runs.
        costs: Times of the phases in seconds, for a micro-batch with load 1.
        steps: For every step, the micro-batches of all replicas.
        message_bytes: Bytes of the boundary between two stages.
        timeout: Longest wait for another rank.
        state: Times of the changes of sharded state in seconds, if the schedule has any.
    """
    dist.init_process_group("gloo", timeout=timeout)
    mesh = Mesh(shape, dist.get_rank(), _CPU, timeout)
    rank = _MeshRank(mesh, schedule, costs, message_bytes, timeout, state)
    try:
        return rank.run(steps)
    except BaseException:
        rank.close()
        mesh.abort()
        raise


class _MeshRank:
    """Holds the executor of one rank, with its stages and its groups."""

    def __init__(
        self,
        mesh: Mesh,
        schedule: Schedule,
        costs: Costs,
        message_bytes: int,
        timeout: timedelta,
        state: State | None,
    ) -> None:
        self._mesh, self._schedule = mesh, schedule
        spec, functions = emulated_stages(schedule.num_stages, message_bytes)
        times = action_times(schedule, costs)
        self._ran: list[Action] = []
        self._stages: dict[int, EmulatedStage] = {}
        for s in schedule.stages_of(mesh.pipeline_rank):
            seconds = {phase: times(phase, s) for phase in COMPUTED_PHASES}
            kind = EmulatedSplitStage if schedule.is_split(s) else EmulatedStage
            self._stages[s] = kind(functions[s], schedule.num_stages, seconds, self._ran)
        self._message_bytes, self._timeout = message_bytes, timeout
        self._links = pipeline_links(mesh) if mesh.shape.size > 1 else None
        self._executor = Executor(mesh.pipeline_rank, self._stages, spec, self._links, timeout)
        self._executor.recorder = self._recorder = ActionRecorder(_CPU)
        self._state: EmulatedState | None = None
        if state is not None:
            of_stages = state_per_stage(state, schedule.num_ranks, schedule.num_stages)
            self._state = EmulatedState(mesh, dict(enumerate(of_stages)))
            self._executor.state = self._state
        self._exchange = None if mesh.graph_group is None else GraphExchange(mesh.graph_group)
        self._gradient = nn.Parameter(torch.zeros(_GRADIENT, dtype=torch.float64))
        for stage in self._stages.values():
            stage.meet = self._exchange

    def close(self) -> None:
        """Closes all connections, so that ranks that wait for this one learn at once that it will not answer."""
        self._executor.close()
        if self._exchange is not None:
            self._exchange.close()
        if self._state is not None:
            self._state.close()

    def run(self, steps: Sequence[MeshWork]) -> MeshRecord:
        """Runs all steps, after the first one without sleeping."""
        record = MeshRecord()
        with no_garbage_collection(), urgently() as urgent:
            record.urgent.append(urgent)
            if self._links is not None:
                rank, size = self._mesh.pipeline_rank, self._mesh.shape.pipeline
                found = message_latencies(self._links, rank, size, self._message_bytes, self._timeout)
                record.latencies.extend(found)
            for number, work in enumerate([steps[0], *steps]):
                mine = work[self._mesh.data_rank]
                loads = [entry.loads[self._mesh.graph_rank] for entry in mine]
                self._step(number, mine, loads if number else [0.0] * len(loads), record)
        self.close()
        return record

    def _step(self, number: int, mine: Sequence[MicrobatchWork], loads: Sequence[float], record: MeshRecord) -> None:
        """Runs one step; the first, number 0, is not recorded."""
        mesh = self._mesh
        spans: list[Span] = []
        for stage in self._stages.values():
            stage.weights = loads
        if self._exchange is not None:
            self._exchange.work, self._exchange.spans = mine, (spans := [])
        inputs, loss = step_data(self._schedule, number * mesh.shape.data + mesh.data_rank)
        self._ran.clear()
        if self._state is not None:
            self._state.step, self._state.factor = number, float(number > 0)
        self._gradient.grad = self._own_gradient(number, mesh.rank)
        start = common_start()
        self._recorder.reset()
        before = time.process_time()
        self._executor.run(self._schedule, inputs, loss)
        began = time.perf_counter()
        self._reduce()
        ended, used = time.perf_counter(), time.process_time() - before
        if self._state is None:
            self._check_gradient(number)
        shift = self._recorder.began - start
        ran = [Span(span.action, span.start + shift, span.end + shift) for span in self._recorder.spans()]
        order = self._schedule.actions[mesh.pipeline_rank]
        check_order(mesh.rank, self._ran, [action for action in order if not action.changes_state])
        check_order(mesh.rank, [s.action for s in ran if not s.action.changes_state], self._ran)
        if number:
            record.actions.append(ran)
            record.exchanges.append([Span(s.action, s.start - start, s.end - start) for s in spans])
            record.reductions.append((began - start, ended - start))
            record.cpu.append(used)

    def _reduce(self) -> None:
        """Reduces the gradient as in training: the sum over graph ranks, the mean over replicas.

        If state is sharded, reductions are under way already, and it waits for them.
        """
        if self._state is not None:
            self._state.finish()
            return
        if self._mesh.graph_group is not None:
            reduce_gradients([self._gradient], self._mesh.graph_group)
        if self._mesh.shape.data > 1:
            assert self._mesh.data_group is not None
            reduce_gradients([self._gradient], self._mesh.data_group, divide_by=self._mesh.shape.data)

    @staticmethod
    def _own_gradient(number: int, rank: int) -> Tensor:
        """Returns the gradient that one rank contributes in a step."""
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
