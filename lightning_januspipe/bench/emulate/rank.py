"""Runs one rank of an emulated pipeline and measures it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.bench.emulate.emulated_stage import (
    EmulationError,
    observable,
    sleep_until,
)
from lightning_januspipe.engine.p2p import Links
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.schedule import Action, Schedule

_CPU = torch.device("cpu")
_ROUNDS = 20  # of messages to both neighbours that are timed
_HOP = 1e-3  # seconds
_START_AFTER = 0.25  # seconds


def check_order(rank: int, ran: Sequence[Action], order: Sequence[Action]) -> None:
    """Checks that a rank ran its schedule's actions, all of them and in their order.

    Raises:
        EmulationError: The rank ran other actions.
    """
    if len(ran) != len(order):
        raise EmulationError(f"rank {rank} ran {len(ran)} actions, its schedule has {len(order)}")
    for position, (found, expected) in enumerate(zip(ran, order, strict=True)):
        if found != expected:
            raise EmulationError(f"rank {rank} ran {found} as its action {position}, its schedule has {expected} there")


def common_start() -> float:
    """Waits for all ranks, and then until a time that is the same on all; the machine has one clock."""
    dist.barrier()
    start = torch.tensor([time.perf_counter() + _START_AFTER], dtype=torch.float64)
    dist.broadcast(start, 0)
    sleep_until(float(start))
    return float(start)


def step_data(schedule: Schedule, step: int) -> tuple[list[MicrobatchInput], Callable[..., LossGradients]]:
    """Returns micro-batches that consist of their serial number, and a loss that checks the results of the stages."""
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


def message_latencies(links: Links, rank: int, size: int, message_bytes: int, timeout: timedelta) -> list[float]:
    """Sends a message down the ranks and up again, with pauses as between phases, and returns its travel times."""
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
    """Returns the time since the message was sent; the machine has one clock."""
    return time.perf_counter() - float(message[0])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the garbage collector from taking time in a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def urgently() -> Iterator[bool]:
    """Gives this process priority over other programs, where the system permits it, and tells whether it does.

    Otherwise a rank that sleeps most of the time waits for a core whenever another program computes, and its schedule
    seems to take longer.
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
