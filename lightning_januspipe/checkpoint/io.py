"""Lightning's CheckpointIO, changed so that it never leaves half a file, and reads only what is needed of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.checkpoint.integrity import is_archive, verify_file
from lightning_januspipe.checkpoint.sharded import tensors_of

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
else:
    TorchCheckpointIO = object  # atomic_checkpoint_io adds that of one Lightning or the other

_MAPPED = ("state_dict", "optimizer_states")
"""The entries of a checkpoint whose values stay in the file until they are copied."""


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local files under a hidden name, syncs them to disk and renames them; reads only files that are whole."""

    cloud_io: Any

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not self.cloud_io._is_local_file_protocol(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic.replacing(Path(path).absolute()) as part:
            atomic.write(checkpoint, part)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        file = Path(path)
        if not self.cloud_io._is_local_file_protocol(str(path)) or not file.is_file():
            return super().load_checkpoint(path, *args, **kwargs)
        verify_file(file)
        if args or kwargs.keys() - {"weights_only"} or not is_archive(file):
            return super().load_checkpoint(path, *args, **kwargs)
        return map_checkpoint(file, **kwargs)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        if self.cloud_io._is_local_file_protocol(str(path)):
            atomic.remove(Path(path))
        else:
            super().remove_checkpoint(path)


def atomic_checkpoint_io(lib: Any) -> Any:
    """Returns Lightning's plugin for files, changed so that a file is written as a whole or not at all."""
    bases = (_AtomicCheckpointIO, lib.torch_io.TorchCheckpointIO)
    return type("AtomicCheckpointIO", bases, {"cloud_io": lib.cloud_io})()


def map_checkpoint(file: Path, weights_only: bool | None = None) -> Any:
    """Reads a checkpoint; its parameters and optimizer states take no memory until something reads them.

    They are pages of the file, which processes of one machine share, and which the system can take back. What keeps
    them has to copy them first: whoever writes over the file in place would change them. All other entries are in
    memory.

    Args:
        file: A zip archive of ``torch.save``.
        weights_only: See ``torch.load``.
    """
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    if isinstance(checkpoint, dict):
        copy_from_file([value for key, value in checkpoint.items() if key not in _MAPPED])
    return checkpoint


def copy_from_file(values: Any) -> None:
    """Gives all tensors in host memory in nested dicts, lists and tuples memory of their own, in place.

    Tensors that share memory among each other still do.
    """
    copies: dict[
        int, tuple[torch.UntypedStorage, torch.UntypedStorage]
    ] = {}  # with those copied, which keep their keys
    for tensor in {id(tensor): tensor for tensor in tensors_of(values)}.values():
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:
                copies[storage._cdata] = storage, storage.clone()
            _, copy = copies[storage._cdata]
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(copy, *place)
