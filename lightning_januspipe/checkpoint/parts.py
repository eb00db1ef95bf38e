"""Holds the parts of tensors that ranks write into a checkpoint folder, without any rank that has the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Part:
    """Holds the entries from ``start`` on of a flattened tensor, as torch.distributed.checkpoint takes them.

    A folder holds the tensor flat; its shape is kept beside it (see :func:`shapes`).

    Attributes:
        values: The entries, a flat tensor.
        start: The index of the first of them.
        shape: The shape of the whole tensor.
    """

    values: Tensor
    start: int
    shape: torch.Size

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        offset = torch.Size([self.start])
        data = TensorWriteData(
            ChunkStorageMetadata(offset, self.values.shape),
            TensorProperties.create_from_tensor(self.values),
            torch.Size([self.shape.numel()]),
        )
        return [WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)]


def shapes(entries: Mapping[str, Any]) -> list[tuple[list[str], list[int]]]:
    """Returns where parts are in nested dicts, and the shapes of the whole tensors."""
    return [(list(path), list(part.shape)) for path, part in _parts(entries, ())]


def restore_shapes(entries: dict[str, Any], found: Sequence[tuple[list[str], list[int]]]) -> None:
    """Gives tensors that were read flat their shapes back."""
    for path, shape in found:
        holder: Any = entries
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = holder[path[-1]].view(shape)


def _parts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Part]]:
    if isinstance(value, Part):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _parts(inside, (*path, key))
