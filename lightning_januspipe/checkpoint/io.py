"""Lightning's CheckpointIO, changed so that it never leaves half a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.checkpoint.integrity import verify_file

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
else:
    TorchCheckpointIO = object  # atomic_checkpoint_io adds that of one Lightning or the other


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
        if self.cloud_io._is_local_file_protocol(str(path)) and Path(path).is_file():
            verify_file(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)

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
