"""Reads the index of a checkpoint folder as plain data: torch writes it as a pickle, which could run any code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

from lightning_januspipe.checkpoint.integrity import require_file
from lightning_januspipe.errors import CheckpointError

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *(
        (_METADATA, name)
        for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    ("collections", "OrderedDict"),
}


def read_index(file: Path) -> Metadata:
    """Returns the index of a checkpoint folder, after a look at whether the shards that it lists are there.

    Args:
        file: The file ``.metadata`` in the folder.

    Raises:
        CheckpointError: The index is damaged, names something other than plain data, or lists a shard that is missing
            or cut off.
    """
    folder = file.parent
    try:
        with open(file, "rb") as stream:
            index: Metadata = _PlainUnpickler(stream).load()
        ends: dict[str, int] = {}
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"it lists the shard {place.relative_path!r} in another folder")
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"the checkpoint {folder} cannot be read: its index {INDEX}: {error}") from error
    for name, end in sorted(ends.items()):
        require_file(folder, name, end, or_more=True)
    return index


class _PlainUnpickler(pickle.Unpickler):
    """Makes the objects of an index and no others."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of shards does; it may run code")
        return super().find_class(module, name)
