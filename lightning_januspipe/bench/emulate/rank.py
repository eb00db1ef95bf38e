"""What each rank of emulated devices does, and what it measures."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.bench.emulate.emulated_stage import (
    EmulatedSplitStage,
    EmulatedStage,
    EmulationError,
    emulated_chain,
    observable,
    sleep_until,
)
from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.p2p import Links
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.engine.timeline import ActionRecorder
from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.costs import Costs, action_times

_CPU = torch.device("cpu")
_ROUNDS = 20
_HOP = 1e-3  # seconds
_START_AFTER = 0.25  # seconds


@dataclass(frozen=True)
class RankRecord:
    """What one rank measured.

    Attributes:
        times: for every step, start and end of the rank's actions in seconds after the common start.
        cpu: for every step, seconds that the rank's process computed, all threads together.
        latencies: seconds from a message's sending to its arrival, each.
        urgent: whether the rank ran before other programs, see :func:`urgently`.
    """

    times: list[list[tuple[float, float]]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    urgent: list[bool] = field(default_factory=list)


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
    stages = {
        s: (EmulatedSplitStage if schedule.is_split(s) else EmulatedStage)(functions[s], schedule.num_stages, {}, ran)
        for s in schedule.stages_of(rank)
    }
    executor = Executor(rank, stages, spec, links, timeout)
    executor.recorder = recorder = ActionRecorder(_CPU)
    record = RankRecord()
    try:
        for step in range(repeats + 1):
            for index, stage in stages.items():
                stage.seconds = {p: times(p, index) if step else 0.0 for p in Phase}
            inputs, loss = step_data(schedule, step)
            ran.clear()
            if step:
                with no_garbage_collection(), urgently() as urgent:
                    if step == 1:
                        record.latencies.extend(_message_latencies(links, rank, size, message_bytes, timeout))
                    start = common_start()
                    recorder.reset()
                    before = time.process_time()
                    executor.run(schedule, inputs, loss)
                    record.cpu.append(time.process_time() - before)
                spans, shift = recorder.spans(), recorder.began - start
                record.times.append([(span.start + shift, span.end + shift) for span in spans])
                record.urgent.append(urgent)
                check_order(rank, [span.action for span in spans], schedule.actions[rank])
            else:
                executor.run(schedule, inputs, loss)
            check_order(rank, ran, schedule.actions[rank])
        return record
    finally:
        executor.close()


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


def common_start() -> float:
    """Wait for all ranks, and then until a time that is the same on all; the clock is one for the whole machine."""
    dist.barrier()
    start = torch.tensor([time.perf_counter() + _START_AFTER], dtype=torch.float64)
    dist.broadcast(start, 0)
    sleep_until(float(start))
    return float(start)


def step_data(schedule: Schedule, step: int) -> tuple[list[MicrobatchInput], Callable[..., LossGradients]]:
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
    length = max(message_bytes // torch.float64.itemsize, 1)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((length,), torch.float64)]
    below, above = rank - 1, rank + 1
    found: list[float] = []

    def send(peer: int) -> None:
        message = torch.zeros(length, dtype=torch.float64)
        sleep_until(time.perf_counter() + _HOP)
        message[0] = time.perf_counter()
        links.to(peer).send([message])

    for _ in range(_ROUNDS):
        dist.barrier()
        from_below = links.from_(below).receive(shapes) if below >= 0 else None
        from_above = links.from_(above).receive(shapes) if above < size else None
        if from_below is not None:
            found.append(_age(from_below.wait(timeout)[0]))
        if from_above is not None:
            send(above)
            found.append(_age(from_above.wait(timeout)[0]))
        if from_below is not None:
            send(below)
    for _, channel in links.outgoing():
        channel.flush(timeout)
    return found


def _age(message: Tensor) -> float:
    """Time since the message was sent; the clock is one for the whole machine."""
    return time.perf_counter() - float(message[0])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Nothing but the step takes time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def urgently() -> Iterator[bool]:
    """Run before other programs, where the system lets this process; says whether it does.

    A rank that sleeps most of the time would else wait for a core whenever something else computes, which is not what
    its schedule costs.
    """
    policies: dict[int, int] = {}
    try:
        for thread in map(int, os.listdir("/proc/self/task")):
            before = os.sched_getscheduler(thread)
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
            policies[thread] = before
    except (OSError, AttributeError):  # not permitted, or not Linux
        pass
    try:
        yield bool(policies)
    finally:
        for thread, before in policies.items():
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, before, os.sched_param(0))
