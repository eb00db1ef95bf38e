"""Moves what phases keep between them to host memory, and brings it back while the action before its reader runs.

Whole storages move, so that tensors keep their strides, and views of one storage go together. On the CPU a storage is
copied to another one of the same memory, so that everything but the streams is the same there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, UntypedStorage

from lightning_januspipe.schedule import Phase


class KeptStorage:
    """Holds the bytes of one storage on the device, on the host, or on both while they are needed again.

    A copy on the host stays valid, because nothing writes to what phases keep: what was brought back leaves the device
    again without being copied.

    Args:
        storage: The storage, on the device.

    Attributes:
        readers: The phases that may read it.
        on_device: The bytes on the device; None where they are on the host only.
        on_host: The bytes on the host, in pinned memory for GPUs; None until they have been copied.
    """

    def __init__(self, storage: UntypedStorage) -> None:
        self.readers: set[Phase] = set()
        self.on_device: Tensor | None = _bytes_of(storage)
        self.on_host: Tensor | None = None
        self._device = storage.device
        self._moved: torch.cuda.Event | None = None

    def to_host(self) -> None:
        """Moves the bytes to the host, if they are on the device."""
        source, self.on_device = self.on_device, None
        if source is not None and self.on_host is None:
            self.on_host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=source.is_cuda)
            self._copy(source, self.on_host)

    def fetch(self) -> None:
        """Starts to bring the bytes back to the device, if they are not there; on a GPU, beside what it computes."""
        if self.on_device is None:
            assert self.on_host is not None
            self.on_device = torch.empty(self.on_host.numel(), dtype=torch.uint8, device=self._device)
            self._copy(self.on_host, self.on_device)

    def on_device_now(self) -> UntypedStorage:
        """Returns the storage on the device; what the present stream computes next waits until it has come."""
        self.fetch()
        assert self.on_device is not None
        if self._moved is not None:
            torch.cuda.current_stream(self._device).wait_event(self._moved)
        return self.on_device.untyped_storage()

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self._device.type != "cuda":
            target.copy_(source)
            return
        stream = _copying_stream(self._device)
        # The present stream computes the source, or has used the target's memory before.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self._moved = stream.record_event()
        (source if source.is_cuda else target).record_stream(stream)


@dataclass(frozen=True)
class KeptTensor:
    """Stands for a tensor whose storage may be on the host."""

    storage: KeptStorage
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Returns the tensor on the device."""
        storage = self.storage.on_device_now()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class KeptValues:
    """Knows the storages that one micro-batch keeps in one stage, as long as something holds their tensors.

    Args:
        given: Tensors whose storages stay where they are: parameters, the batch and boundaries, which others hold too.
    """

    def __init__(self, given: Collection[Tensor]) -> None:
        self._given = {t.untyped_storage()._cdata for t in given if t.layout is torch.strided}
        self._storages: WeakSet[KeptStorage] = WeakSet()
        self._by_address: WeakValueDictionary[int, KeptStorage] = WeakValueDictionary()

    def add(self, tensor: Tensor, readers: Collection[Phase]) -> KeptTensor | None:
        """Takes in a tensor; returns what stands for it, or None if it stays where it is.

        Args:
            tensor: The tensor, on the device.
            readers: The phases that may read it.
        """
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in self._given or not storage.nbytes():
            return None
        kept = self._by_address.get(storage._cdata)
        if kept is None:
            kept = self._by_address[storage._cdata] = KeptStorage(storage)
            self._storages.add(kept)
        kept.readers.update(readers)
        return KeptTensor(kept, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def to_host(self, following: Phase | None) -> None:
        """Moves all storages to the host but those that the following phase reads.

        Args:
            following: The phase of the same micro-batch that this rank runs next; None if it runs another one's.
        """
        for kept in self._storages:
            if following not in kept.readers:
                kept.to_host()
        self._note_addresses()

    def fetch(self, phase: Phase) -> None:
        """Starts to bring back what a phase reads."""
        for kept in self._storages:
            if phase in kept.readers:
                kept.fetch()
        self._note_addresses()

    def _note_addresses(self) -> None:
        """Notes where storages are: an address may be used again once a storage has left the device."""
        on_device = [(kept.on_device, kept) for kept in self._storages]
        self._by_address.clear()
        self._by_address.update((t.untyped_storage()._cdata, kept) for t, kept in on_device if t is not None)

    def host_tensors(self) -> list[Tensor]:
        """Returns the copies on the host."""
        return [kept.on_host for kept in self._storages if kept.on_host is not None]

    def device_bytes(self) -> int:
        """Returns the bytes of the storages that are on the device."""
        return sum(kept.on_device.numel() for kept in self._storages if kept.on_device is not None)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
