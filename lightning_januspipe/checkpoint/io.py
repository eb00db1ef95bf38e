"""Lightning's CheckpointIO that never leaves half a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_januspipe.checkpoint import atomic

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
else:
    TorchCheckpointIO = object  # that of one Lightning or the other is the second base


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Comes before Lightning's own plugin: local files are synced and renamed in their own folder."""

    cloud_io: Any

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not self.cloud_io._is_local_file_protocol(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic.replacing(Path(path).absolute()) as part:
            torch.save(checkpoint, part)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        if self.cloud_io._is_local_file_protocol(str(path)):
            atomic.remove(Path(path))
        else:
            super().remove_checkpoint(path)


def atomic_checkpoint_io(lib: Any) -> Any:
    """Lightning's plugin for files, which are whole or not there."""
    bases = (_AtomicCheckpointIO, lib.torch_io.TorchCheckpointIO)
    return type("AtomicCheckpointIO", bases, {"cloud_io": lib.cloud_io})()
