"""What ranks do in the tests of emulated devices, where something is wrong: run with ``RankPool.run``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.bench.emulate import MeshWork, MicrobatchWork, mesh_rank
from lightning_januspipe.bench.emulate.emulated_stage import EmulatedStage
from lightning_januspipe.bench.emulate.mesh_rank import emulate_mesh_rank
from lightning_januspipe.engine.gradients import reduce_gradients
from lightning_januspipe.engine.p2p import Channel
from lightning_januspipe.engine.route import Route
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import PhaseCosts, Schedule
from lightning_januspipe.schedule.actions import Message


def _kind(message: Message) -> tuple[Any, ...]:
    source, target = message
    return source.phase, source.stage, target.phase, target.stage


def _emulate(schedule: Schedule) -> str:
    """Returns the error of this rank of one pipeline, or nothing."""
    work = [[MicrobatchWork((1.0,))] * schedule.num_microbatches]
    return _emulate_mesh(MeshShape(schedule.num_ranks, 1, 1), schedule, [work])


def with_a_repeated_message(schedule: Schedule, source: str, target: str) -> str:
    """Runs with one message replaced by the one before of the same kind, between two given phases."""
    order = schedule.messages()
    sent: Counter[int] = Counter()
    kept: dict[Any, list[Tensor]] = {}
    replaced: list[Message] = []
    send = Channel.send

    def wrong(self: Channel, tensors: Sequence[Tensor], consumed_at: int | None = None) -> None:
        if consumed_at is not None:  # a message of the schedule
            messages = order[dist.get_rank(), self.peer]
            message = messages[sent[self.peer] % len(messages)]
            sent[self.peer] += 1
            is_labelled = source == target or message.target.stage > 0  # nothing enters the first stage
            if (message.source.phase, message.target.phase) == (source, target) and is_labelled and not replaced:
                before = kept.setdefault(_kind(message), list(tensors))
                if before[0] is not tensors[0]:
                    replaced.append(message)
                    tensors = before
        send(self, tensors, consumed_at)

    with mock.patch.object(Channel, "send", wrong):
        return _emulate(schedule)


def with_a_silent_stage(schedule: Schedule, stage: int) -> str:
    """Runs with a stage that adds nothing to the derivative."""
    forward_force = EmulatedStage.forward_force

    def wrong(self: EmulatedStage, *args: Any, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
        gradients, parts = forward_force(self, *args, **more)
        return gradients, [p * (self.function.index != stage) for p in parts]

    with mock.patch.object(EmulatedStage, "forward_force", wrong):
        return _emulate(schedule)


def with_two_actions_swapped(schedule: Schedule, rank: int, position: int) -> str:
    """Runs with an action of a rank before the one before it."""
    init = Route.__init__

    def wrong(self: Route, schedule: Schedule, of: int) -> None:
        init(self, schedule, of)
        if of == rank:
            order = list(self.order)
            order[position - 1 : position + 1] = reversed(order[position - 1 : position + 1])
            self.order = tuple(order)

    with mock.patch.object(Route, "__init__", wrong):
        return _emulate(schedule)


def _emulate_mesh(shape: MeshShape, schedule: Schedule, steps: list[MeshWork]) -> str:
    """Returns the error of this rank, or nothing."""
    try:
        emulate_mesh_rank(shape, schedule, PhaseCosts(1e-3, 1e-3, 1e-3, 1e-3), steps, 256, timedelta(seconds=60))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def with_other_work(schedule: Schedule) -> str:
    """Runs on two graph ranks that take different micro-batches for the one that is sharded."""
    whole, sharded = MicrobatchWork((1.0, 1.0)), MicrobatchWork((1.0, 1.0), is_sharded=True)
    order = [sharded, whole] if int(os.environ["RANK"]) == 0 else [whole, sharded]
    return _emulate_mesh(MeshShape(1, 1, 2), schedule, [[order]])


def with_an_unreduced_gradient(schedule: Schedule) -> str:
    """Runs on two replicas that sum their gradients and do not average them."""

    def wrong(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, divide_by: int = 1) -> None:
        reduce_gradients(parameters, group)

    with mock.patch.object(mesh_rank, "reduce_gradients", wrong):
        return _emulate_mesh(MeshShape(1, 2), schedule, [[[MicrobatchWork((1.0,))]] * 2])


def with_the_end_of_a_rank(schedule: Schedule, rank: int) -> str:
    """Runs on two pipelines of two ranks, graph ranks of each other, and ends one rank in its second BF."""
    backward_force = EmulatedStage.backward_force

    def wrong(self: EmulatedStage, microbatch: int, *args: Any, **more: Any) -> list[Tensor]:
        if dist.get_rank() == rank and microbatch == 1:
            os._exit(1)
        return backward_force(self, microbatch, *args, **more)

    work = [MicrobatchWork((1.0, 1.0), is_sharded=True)] * schedule.num_microbatches
    with mock.patch.object(EmulatedStage, "backward_force", wrong):
        emulate_mesh_rank(MeshShape(2, 1, 2), schedule, PhaseCosts(1, 1, 1, 1), [[work]], 256, timedelta(seconds=60))
    return ""
