"""Sends and receives messages between two ranks of a pipeline.

Each direction has a process group of its own, so that messages between two ranks match in the order in which they are
sent, which is what NCCL needs. A message is one buffer of bytes; the receiver knows its length beforehand.

Two ranks that share one GPU cannot use NCCL, and gloo sends from the host's memory only. There, messages of a GPU go
through pinned buffers of the host.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 16  # bytes: each tensor in a message begins at a multiple of it

Shapes = list[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a message."""


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors of any dtype as one buffer of bytes."""
    parts = []
    for tensor in tensors:
        part = tensor.detach().contiguous().reshape(-1)
        # A slice with one number counts as contiguous whatever its stride, but not as viewable.
        part = part.as_strided(part.shape, (1,)).view(torch.uint8)
        parts.append(part)
        padding = -part.numel() % _ALIGNMENT
        if padding:
            parts.append(part.new_zeros(padding))
    if not parts:
        return torch.empty(0, dtype=torch.uint8)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def packed_size(shapes: Shapes) -> int:
    """Returns the length of the buffer that :func:`pack` makes of tensors with these shapes, in bytes."""
    sizes = [torch.Size(s).numel() * d.itemsize for s, d in shapes]
    return sum(n + -n % _ALIGNMENT for n in sizes)


def unpack(buffer: Tensor, shapes: Shapes) -> list[Tensor]:
    """Returns the tensors of a buffer, as views of it."""
    tensors, start = [], 0
    for shape, dtype in shapes:
        num = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(buffer[start : start + num].view(dtype).view(shape))
        start += num + -num % _ALIGNMENT
    return tensors


@dataclass
class Receive:
    """Waits for one message; its receive is posted.

    Attributes:
        shapes: What the message holds.
        buffer: Where it comes.
        work: The receive; None for an empty message.
        device: Where its tensors are wanted.
    """

    shapes: Shapes
    buffer: Tensor
    work: dist.Work | None
    device: torch.device

    def wait(self, timeout: timedelta | None) -> list[Tensor]:
        """Returns the message's tensors, once they are here."""
        if self.work is not None:
            _wait(self.work, self.buffer, timeout)
        return unpack(self.buffer.to(self.device, non_blocking=True), self.shapes)


def _wait(work: dist.Work, buffer: Tensor, timeout: timedelta | None) -> None:
    if timeout is None or buffer.is_cuda:
        work.wait()
    else:
        work.wait(timeout)


def needs_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Tells whether a group sends a device's tensors from the host's memory only: those of a GPU with gloo."""
    return device.type == "cuda" and f"{device.type}:gloo" in dist.get_backend_config(group)


def on_host(buffer: Tensor) -> Tensor:
    """Returns a copy of a buffer in the host's memory, once what computes the buffer has ended."""
    copy = _host_buffer(buffer.numel(), buffer.device)
    copy.copy_(buffer, non_blocking=True)
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
    return copy


def _host_buffer(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Channel:
    """Carries the messages between this rank and another one, in one direction.

    Args:
        group: Process group of this direction.
        peer: Global rank of the other.
        device: The device of the tensors.
        through_host: Whether messages go through the host's memory; None to do so where the group needs it.
    """

    def __init__(
        self, group: dist.ProcessGroup, peer: int, device: torch.device, through_host: bool | None = None
    ) -> None:
        self.peer = peer
        self._through_host = needs_host(group, device) if through_host is None else through_host
        self._group: dist.ProcessGroup | None = group
        self._device = device
        self._sent: deque[tuple[int | None, dist.Work, Tensor]] = deque()
        self.bytes_sent = 0

    def send(self, tensors: Sequence[Tensor], consumed_at: int | None = None) -> None:
        """Starts to send a message; its buffer is kept until it has left.

        Args:
            tensors: The message.
            consumed_at: Index of the receiver's action that reads it; see :meth:`release`.
        """
        buffer = pack(tensors)
        if buffer.numel() == 0:
            return
        if self._through_host:
            buffer = on_host(buffer)
        work = dist.isend(buffer, self.peer, group=self._group)
        assert work is not None
        self.bytes_sent += buffer.numel()
        self._sent.append((consumed_at, work, buffer))

    def release(self, done: int) -> None:
        """Frees the buffers of messages that the receiver has read.

        gloo tells that a send is complete only if one waits for it, so this waits for the sends that are known to be
        complete. As messages match in order, all messages before one that was read have come too.

        Args:
            done: Index of the last action that the receiver has run.
        """
        num = max((i + 1 for i, (at, _, _) in enumerate(self._sent) if at is not None and at <= done), default=0)
        for _ in range(num):
            _, work, _ = self._sent.popleft()
            work.wait()

    def receive(self, shapes: Shapes) -> Receive:
        """Posts the receive of the next message in this direction."""
        if self._through_host:
            buffer = _host_buffer(packed_size(shapes), self._device)
        else:
            buffer = torch.empty(packed_size(shapes), dtype=torch.uint8, device=self._device)
        work = dist.irecv(buffer, self.peer, group=self._group) if buffer.numel() else None
        return Receive(shapes, buffer, work, self._device)

    def close(self) -> None:
        """Lets go of the group and of everything under way, so that the connection can be closed."""
        self._sent.clear()
        self._group = None

    def flush(self, timeout: timedelta | None) -> None:
        """Waits until everything sent has left."""
        for _, work, buffer in self._sent:
            _wait(work, buffer, timeout)
        self._sent.clear()


class Links:
    """Makes the channels of one rank to and from the other ranks of its pipeline, when they are first used.

    Args:
        rank: This rank's index in the pipeline.
        global_ranks: The global rank at each index.
        down: Process group of messages to higher ranks of the pipeline.
        up: Process group of messages to lower ranks of the pipeline. In one process there are none.
        device: The device of the buffers.

    Attributes:
        rank: This rank's index in the pipeline.
        num_ranks: Ranks of the pipeline.
        device: The device of the buffers.
    """

    def __init__(
        self,
        rank: int,
        global_ranks: Sequence[int],
        down: dist.ProcessGroup | None,
        up: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.device = device
        self.rank, self.num_ranks = rank, len(global_ranks)
        self._global_ranks = list(global_ranks)
        self._groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] | None = (down, up)
        self._to: dict[int, Channel] = {}
        self._from: dict[int, Channel] = {}

    def global_rank(self, peer: int) -> int:
        """Returns the global rank at an index in the pipeline."""
        return self._global_ranks[peer]

    def to(self, peer: int) -> Channel:
        """Returns the channel to another rank of the pipeline."""
        if peer not in self._to:
            self._to[peer] = self._channel(peer, downward=peer > self.rank)
        return self._to[peer]

    def from_(self, peer: int) -> Channel:
        """Returns the channel from another rank of the pipeline."""
        if peer not in self._from:
            self._from[peer] = self._channel(peer, downward=peer < self.rank)
        return self._from[peer]

    def connect(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Makes connections before a schedule uses them.

        With NCCL two ranks connect with their first message, and each waits for the other then. In the middle of a
        schedule the receiver may be waiting for something that the sender does only later.

        Args:
            pairs: Sender and receiver of each connection, the same on all ranks.
        """
        for sender, receiver in sorted(set(pairs)):  # one after the other in one order, so no cycle of waits
            if sender == self.rank:
                self.to(receiver).send([torch.zeros(1, dtype=torch.uint8, device=self.device)])
                self.to(receiver).flush(None)
            elif receiver == self.rank:
                self.from_(sender).receive([((1,), torch.uint8)]).wait(None)

    def outgoing(self) -> list[tuple[int, Channel]]:
        """Returns all channels that were sent through, each with the receiver's index in the pipeline."""
        return list(self._to.items())

    @property
    def bytes_sent(self) -> int:
        """Returns the bytes of all messages so far."""
        return sum(channel.bytes_sent for channel in self._to.values())

    def close(self) -> None:
        """Lets go of the groups and of everything under way, so that the connections can be closed."""
        for channel in (*self._to.values(), *self._from.values()):
            channel.close()
        self._groups = None

    def _channel(self, peer: int, downward: bool) -> Channel:
        assert self._groups is not None, "the links were closed"
        group = self._groups[0 if downward else 1]
        assert group is not None, "in one process there are no messages"
        return Channel(group, self._global_ranks[peer], self.device)


def message_latency(links: Links, num_messages: int = 10) -> float:
    """Measures how long a small message takes: half the round trip between the first two ranks, median of several.

    Args:
        links: The connections of this rank. All ranks of the pipeline may call this, the first two have to.
        num_messages: How many messages go there and back.

    Returns:
        The latency in seconds as rank 0 sees it; 0 on other ranks, and if there is one rank only.
    """
    rank = links.rank
    if rank > 1 or links.num_ranks == 1:
        return 0.0
    links.connect([(0, 1), (1, 0)])
    message = [torch.zeros(256, dtype=torch.uint8, device=links.device)]
    shapes: Shapes = [((256,), torch.uint8)]
    times = []
    for _ in range(num_messages + 1):
        receive = links.from_(1 - rank).receive(shapes)
        began = time.perf_counter()
        if rank == 1:
            receive.wait(None)
        links.to(1 - rank).send(message)
        if rank == 0:
            receive.wait(None)
        if links.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    links.to(1 - rank).flush(None)
    return statistics.median(times[1:]) / 2 if rank == 0 else 0.0
