"""Emulated devices: schedules run by the real executor with real messages, and phases that sleep.

A sleeping rank needs no core, so a pipeline of many ranks runs in full length on a machine with a few. What is left of
a step beside its phases is the runtime: the executor, the messages, the waiting of one rank for another. So this
measures the runtime, and how true the simulated times of schedules are.

Every tensor that a phase makes says where it comes from, and every phase checks what it gets: a message that reached
the wrong action ends the run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.engine.executor import Executor, LossGradients, MicrobatchInput
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.p2p import Links
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.engine.timeline import Recorder, Span, recorded_report
from lightning_januspipe.schedule import Action, Phase, PhaseCosts, Report, Schedule, simulate
from lightning_januspipe.schedule.costs import Costs, action_times
from lightning_januspipe.testing import RankPool

_CPU = torch.device("cpu")
_LABEL = 4  # entries of a label
_CHAIN, _OWN = -1.0, -2.0  # kinds of messages: along the chain, and from BF to BE of the same stage
_EARLY = 1.5e-4  # seconds
_ROUNDS = 20
_HOP = 1e-3  # seconds
_START_AFTER = 0.25  # seconds


class EmulationError(AssertionError):
    """A phase got a message that was not for it, or actions ran in another order than that of the schedule."""


@dataclass(frozen=True)
class EmulatedFunction:
    """The shapes of an emulated stage; there is nothing to evaluate.

    Attributes: see :class:`~lightning_januspipe.engine.specs.StageFunction`.
    """

    index: int
    boundary_in: Sequence[TensorSpec]
    boundary_out: Sequence[TensorSpec]
    observables: Sequence[int]
    parameters: Sequence[nn.Parameter] = ()

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Not used: the phases of :class:`EmulatedStage` sleep."""
        raise NotImplementedError


def emulated_chain(num_stages: int, message_bytes: int) -> tuple[ChainSpec, list[EmulatedFunction]]:
    """A chain with one observable in its first and one in its last stage, and a derivative with an entry per stage.

    Args:
        num_stages: length of the chain.
        message_bytes: bytes of the boundary between two stages.
    """
    boundary = [TensorSpec((max(message_bytes // torch.float64.itemsize, 2 * _LABEL),), torch.float64)]
    last = num_stages - 1
    spec = ChainSpec(
        coordinates=(TensorSpec((num_stages,), torch.float64),),
        observables=(TensorSpec((2,), torch.float64),) * 2,
        observable_stage=(0, last),
    )
    functions = [
        EmulatedFunction(
            s,
            boundary if s else [],
            boundary if s < last else [],
            [i for i, stage in enumerate(spec.observable_stage) if stage == s],
        )
        for s in range(num_stages)
    ]
    return spec, functions


class EmulatedStage(Stage):
    """A stage whose phases check what they get, sleep, and return labelled tensors of the right shapes.

    Labels hold the serial number of the micro-batch, which no other one has in this step or another, the phase, and the
    stage.

    Args:
        function: the shapes.
        num_stages: length of the chain.
        seconds: how long each phase takes.
        ran: gets every action that runs.
    """

    def __init__(
        self, function: EmulatedFunction, num_stages: int, seconds: Mapping[Phase, float], ran: list[Action]
    ) -> None:
        super().__init__(function, GradientBuffers())
        self.seconds = seconds
        self._num_stages, self._ran = num_stages, ran
        self._serials: dict[int, int] = {}

    @property
    def num_inflight(self) -> int:
        """Micro-batches between their first and their last phase here."""
        return len(self._serials)

    def clear(self) -> None:
        """Forget all micro-batches."""
        self._serials.clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FE: a boundary, and the observables of this stage."""
        self._serials[microbatch] = int(tensors[0])
        self._check(Phase.FE, microbatch, boundary, self.function.boundary_in, Phase.FE, -1)
        self._run(Phase.FE, microbatch)
        serial = self._serials[microbatch]
        return self._made(Phase.FE, microbatch, self.function.boundary_out), [
            observable(serial, i) for i in self.function.observables
        ]

    def recompute_energy(self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> None:
        """FE on the rank of FF; its time is a part of FF's."""
        self._serials[microbatch] = int(tensors[0])
        self._check(Phase.FF, microbatch, boundary, self.function.boundary_in, Phase.FE, -1)

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FF: a gradient of the boundary, and a derivative with this stage's entry only."""
        assert create_graph, "evaluation is not emulated"
        self._check(Phase.FF, microbatch, boundary_gradients, self.function.boundary_out, Phase.FF, 1)
        self._run(Phase.FF, microbatch)
        part = torch.zeros(self._num_stages, dtype=torch.float64)
        part[self.function.index] = self._serials[microbatch]
        return self._made(Phase.FF, microbatch, self.function.boundary_in), [part]

    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> list[Tensor]:
        """BF: a cotangent of the boundary's gradient."""
        self._check(Phase.BF, microbatch, boundary_cotangents, self.function.boundary_in, Phase.BF, -1)
        self._check_loss(Phase.BF, microbatch, derivative_cotangents)
        self._run(Phase.BF, microbatch)
        return self._made(Phase.BF, microbatch, self.function.boundary_out)

    def backward_force_apart(
        self, microbatch: int, boundary_cotangents: Sequence[Tensor], derivative_cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """BF, and what it sends to the rank that runs BE."""
        found = self.backward_force(microbatch, boundary_cotangents, derivative_cotangents)
        own = self._made(Phase.BF, microbatch, self.function.boundary_in, _OWN)
        del self._serials[microbatch]
        return found, own

    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        more: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """BE: a cotangent of the boundary."""
        self._check(Phase.BE, microbatch, boundary_cotangents, self.function.boundary_out, Phase.BE, 1)
        self._check(Phase.BE, microbatch, more, self.function.boundary_in if more else [], Phase.BF, 0, _OWN)
        self._check_loss(Phase.BE, microbatch, observable_cotangents)
        self._run(Phase.BE, microbatch)
        found = self._made(Phase.BE, microbatch, self.function.boundary_in)
        if not defer:
            del self._serials[microbatch]
        return found

    def weight_force(self, microbatch: int) -> None:
        """WF: nothing but its time."""
        self._run(Phase.WF, microbatch)

    def weight_energy(self, microbatch: int) -> None:
        """WE: the micro-batch ends."""
        self._run(Phase.WE, microbatch)
        del self._serials[microbatch]

    def _run(self, phase: Phase, microbatch: int) -> None:
        began = time.perf_counter()
        self._ran.append(Action(phase, self.function.index, microbatch))
        sleep_until(began + self.seconds[phase])

    def _made(self, phase: Phase, microbatch: int, specs: Sequence[TensorSpec], kind: float = _CHAIN) -> list[Tensor]:
        """A labelled tensor for each spec; the label is at both ends."""
        label = torch.tensor(self._label(phase, self.function.index, microbatch, kind), dtype=torch.float64)
        made = []
        for spec in specs:
            tensor = torch.zeros(spec.sizes({}), dtype=spec.dtype)
            tensor[:_LABEL] = tensor[-_LABEL:] = label
            made.append(tensor)
        return made

    def _label(self, phase: Phase, stage: int, microbatch: int, kind: float) -> list[float]:
        return [float(self._serials[microbatch]), float(list(Phase).index(phase)), float(stage), kind]

    def _check(
        self,
        phase: Phase,
        microbatch: int,
        came: Sequence[Tensor],
        specs: Sequence[TensorSpec],
        source: Phase,
        step: int,
        kind: float = _CHAIN,
    ) -> None:
        """What came has to be what ``source`` of the stage ``step`` further made of this micro-batch."""
        action = Action(phase, self.function.index, microbatch)
        if len(came) != len(specs):
            raise EmulationError(f"{action} got {len(came)} tensors, expected {len(specs)}")
        expected = self._label(source, self.function.index + step, microbatch, kind)
        for tensor in came:
            for found in (tensor[:_LABEL].tolist(), tensor[-_LABEL:].tolist()):
                if found != expected:
                    raise EmulationError(
                        f"{action} got a message labelled {found}, expected {expected} (serial number of the "
                        "micro-batch, phase, stage, kind): it was made by another action"
                    )

    def _check_loss(self, phase: Phase, microbatch: int, cotangents: Sequence[Tensor | None]) -> None:
        for cotangent in cotangents:
            assert cotangent is not None
            if int(cotangent[0]) != self._serials[microbatch]:
                action = Action(phase, self.function.index, microbatch)
                raise EmulationError(
                    f"{action} got the loss of micro-batch {int(cotangent[0])}, expected {self._serials[microbatch]}"
                )


def observable(serial: int, position: int) -> Tensor:
    """The observable at a position that belongs to a micro-batch."""
    return torch.tensor([serial, position], dtype=torch.float64)


def sleep_until(deadline: float) -> None:
    """Sleep until ``time.perf_counter()`` has reached a time, and little longer.

    Sleeping takes 0.05 to 0.2 ms more than asked for, so this wakes up a little early and sleeps the rest in short pieces.
    Nothing waits busily: ranks are more than cores.
    """
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left - _EARLY if left > 2 * _EARLY else min(left, 1e-5))


def check_order(rank: int, ran: Sequence[Action], order: Sequence[Action]) -> None:
    """Check that a rank ran its schedule's actions, all of them and in their order.

    Raises:
        EmulationError: it did not.
    """
    if len(ran) != len(order):
        raise EmulationError(f"rank {rank} ran {len(ran)} actions, its schedule has {len(order)}")
    for position, (found, expected) in enumerate(zip(ran, order, strict=True)):
        if found != expected:
            raise EmulationError(f"rank {rank} ran {found} as its action {position}, its schedule has {expected} there")


@dataclass(frozen=True)
class RankRecord:
    """What one rank measured.

    Attributes:
        times: for every step, start and end of the rank's actions in seconds after the common start.
        cpu: for every step, seconds that the rank's process computed, all threads together.
        latencies: seconds from a message's sending to its arrival, each.
    """

    times: list[list[tuple[float, float]]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def emulate_rank(schedule: Schedule, costs: Costs, repeats: int, message_bytes: int, timeout: timedelta) -> RankRecord:
    """What every rank does: connect, measure messages, run a step without sleeping, then steps with it.

    Args:
        schedule: what to run.
        costs: times of the phases in seconds.
        repeats: number of measured steps.
        message_bytes: bytes of the boundary between two stages.
        timeout: how long to wait for a message.
    """
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    down, up = dist.new_group(), dist.new_group()
    assert down is not None and up is not None
    links = Links(rank, range(size), down, up, _CPU)
    spec, functions = emulated_chain(schedule.num_stages, message_bytes)
    times = action_times(schedule, costs)
    ran: list[Action] = []
    stages = {s: EmulatedStage(functions[s], schedule.num_stages, {}, ran) for s in schedule.stages_of(rank)}
    executor = Executor(rank, stages, spec, links, _CPU, timeout)
    executor.recorder = recorder = Recorder(_CPU)
    record = RankRecord()
    try:
        for step in range(repeats + 1):
            for index, stage in stages.items():
                stage.seconds = {p: times(p, index) if step else 0.0 for p in Phase}
            inputs, loss = _step_data(schedule, step)
            ran.clear()
            start = _common_start()
            with _no_garbage_collection():
                recorder.reset()
                before = time.process_time()
                executor.run(schedule, inputs, loss)
                cpu = time.process_time() - before
            check_order(rank, ran, schedule.actions[rank])
            spans, shift = recorder.spans(), recorder.began - start
            check_order(rank, [span.action for span in spans], schedule.actions[rank])
            if step:
                record.times.append([(span.start + shift, span.end + shift) for span in spans])
                record.cpu.append(cpu)
            else:
                record.latencies.extend(_message_latencies(links, rank, size, message_bytes, timeout))
        return record
    finally:
        executor.close()


def _common_start() -> float:
    """Wait for all ranks, and then until a time that is the same on all; the clock is one for the whole machine."""
    dist.barrier()
    start = torch.tensor([time.perf_counter() + _START_AFTER], dtype=torch.float64)
    dist.broadcast(start, 0)
    sleep_until(float(start))
    return float(start)


def _step_data(schedule: Schedule, step: int) -> tuple[list[MicrobatchInput], Callable[..., LossGradients]]:
    """Micro-batches that consist of their serial number, and a loss that checks what the chain made of them."""
    num = schedule.num_microbatches
    serials = [step * num + m + 1 for m in range(num)]

    def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        serial = serials[index]
        expected = [observable(serial, i).tolist() for i in range(2)]
        if [y.tolist() for y in observables] != expected:
            raise EmulationError(f"micro-batch {index} has observables {observables}, expected {expected}")
        parts = derivatives[0].tolist()
        if parts != [serial] * schedule.num_stages:
            raise EmulationError(f"micro-batch {index} has derivative {parts}, expected {serial} from every stage")
        mark = torch.tensor([serial], dtype=torch.float64)
        return LossGradients([mark, mark], [mark])

    return [MicrobatchInput([torch.tensor(serial)], {}) for serial in serials], loss


def _message_latencies(links: Links, rank: int, size: int, message_bytes: int, timeout: timedelta) -> list[float]:
    """Send a message down the ranks and up again, with a pause on each as between phases; the times it travelled."""
    shapes = [((max(message_bytes // 8, 1),), torch.float64)]
    below, above = rank - 1, rank + 1
    found: list[float] = []

    def send(peer: int) -> None:
        message = torch.zeros(shapes[0][0], dtype=torch.float64)
        sleep_until(time.perf_counter() + _HOP)
        message[0] = time.perf_counter()
        links.to(peer).send([message])

    for _ in range(_ROUNDS):
        dist.barrier()
        from_below = links.from_(below).receive(shapes) if below >= 0 else None
        from_above = links.from_(above).receive(shapes) if above < size else None
        if from_below is not None:
            found.append(-float(from_below.wait(timeout)[0][0]) + time.perf_counter())
        if from_above is not None:
            send(above)
            found.append(-float(from_above.wait(timeout)[0][0]) + time.perf_counter())
        if from_below is not None:
            send(below)
    for _, channel in links.outgoing():
        channel.flush(timeout)
    return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class EmulatedRun:
    """A schedule simulated, and run on emulated devices. Times are in seconds.

    Attributes:
        schedule: the schedule.
        simulated: its simulation without any cost of messages.
        with_messages: its simulation with the measured latency of a message.
        latency: median time from the sending of a message to its arrival.
        makespans: time from the common start of all ranks to the last end, of every step.
        report: the step with the median makespan, as it ran.
        oversleep: median time that a phase took longer than asked for.
        handover: median time from the end of an action to the start of one on another rank that waited for it.
        cpu: share of one core that the busiest rank's process used, all its threads together.
    """

    schedule: Schedule
    simulated: Report
    with_messages: Report
    latency: float
    makespans: tuple[float, ...]
    report: Report
    oversleep: float
    handover: float
    cpu: float

    @property
    def makespan(self) -> float:
        """Median over the steps."""
        return statistics.median_low(self.makespans)

    @property
    def error(self) -> float:
        """By how much the steps took longer than simulated with messages, as a share."""
        return self.makespan / self.with_messages.makespan - 1


def emulate(
    schedule: Schedule,
    costs: Costs,
    *,
    seconds_per_unit: float,
    repeats: int = 3,
    message_bytes: int = 1024,
    pool: RankPool | None = None,
) -> EmulatedRun:
    """Run a schedule on emulated devices, one process for each rank, and lay it beside its simulation.

    Args:
        schedule: the schedule.
        costs: as of :func:`~lightning_januspipe.schedule.simulate`.
        seconds_per_unit: seconds in one unit of the costs; phases of less than a few milliseconds measure the machine
            and not the schedule.
        repeats: number of steps.
        message_bytes: bytes of the boundary between two stages; a message has some more for energies and forces.
        pool: where to run; None starts processes for this call.

    Raises:
        ValueError: an argument is not positive, or the pool has too few processes.
        RankError: a rank failed; an :class:`EmulationError` in its message is a message in the wrong place.
    """
    for name, value in (("seconds_per_unit", seconds_per_unit), ("repeats", repeats), ("message_bytes", message_bytes)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}; expected a positive number")
    if pool is not None and pool.size < schedule.num_ranks:
        raise ValueError(f"{schedule.name!r} has {schedule.num_ranks} ranks, but the pool has {pool.size} processes")
    seconds = in_seconds(costs, seconds_per_unit)
    simulated = simulate(schedule, seconds)
    # A rank may have to wait for a whole step; the rest is for what else the machine does.
    timeout = 60 + 3 * simulated.makespan
    with nullcontext(pool) if pool is not None else RankPool(schedule.num_ranks) as ranks:
        records = ranks.run(
            emulate_rank,
            schedule,
            seconds,
            repeats,
            message_bytes,
            timedelta(seconds=timeout),
            world_size=schedule.num_ranks,
            timeout=120 + (repeats + 1) * timeout,
        )
    return _evaluated(schedule, seconds, simulated, records)


def in_seconds(costs: Costs, seconds_per_unit: float) -> PhaseCosts | list[PhaseCosts]:
    """The costs in seconds."""
    if not isinstance(costs, PhaseCosts):
        return [in_seconds(entry, seconds_per_unit) for entry in costs]  # type: ignore[misc]
    return PhaseCosts(**{f.name: seconds_per_unit * getattr(costs, f.name) for f in fields(costs)})


def _evaluated(schedule: Schedule, costs: Costs, simulated: Report, records: Sequence[RankRecord]) -> EmulatedRun:
    latencies = [latency for record in records for latency in record.latencies]
    latency = statistics.median(latencies) if latencies else 0.0
    makespans = tuple(
        max(end for times in steps for _, end in times) for steps in zip(*(r.times for r in records), strict=True)
    )
    step = makespans.index(statistics.median_low(makespans))
    spans = {
        rank: [Span(a, *times) for a, times in zip(order, record.times[step], strict=True)]
        for rank, (order, record) in enumerate(zip(schedule.actions, records, strict=True))
    }
    report = replace(recorded_report(schedule, spans), makespan=makespans[step], ideal=simulated.ideal)
    asked = action_times(schedule, costs)
    return EmulatedRun(
        schedule=schedule,
        simulated=simulated,
        with_messages=simulate(schedule, costs, comm=latency),
        latency=latency,
        makespans=makespans,
        report=report,
        oversleep=statistics.median(
            s.end - s.start - asked(s.action.phase, s.action.stage) for of in spans.values() for s in of
        ),
        handover=_handover(schedule, report),
        cpu=max(record.cpu[step] for record in records) / makespans[step],
    )


def _handover(schedule: Schedule, report: Report) -> float:
    """Median time from an end to the start of what waited for it on another rank."""
    found = []
    for order in schedule.actions:
        free = 0.0
        for action in order:
            ready = max((report.end[m.source] for m in schedule.received(action)), default=0.0)
            if ready > free:
                found.append(report.start[action] - ready)
            free = report.end[action]
    return statistics.median(found) if found else 0.0
