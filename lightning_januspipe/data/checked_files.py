"""Writes files that processes and jobs share: whole or not at all, with a checksum that is verified on reading."""

from __future__ import annotations

import fcntl
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_januspipe.checkpoint import atomic

_MAGIC = b"januspipe data\n\0"
_DIGEST = 32  # bytes of the checksum
_START = len(_MAGIC) + 8 + _DIGEST  # of the payload, which begins with its own header
_ALIGNED = 64  # bytes: arrays begin at multiples of it
_BLOCK = 1 << 22  # bytes that are read at once


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], info: Mapping[str, Any]) -> None:
    """Replaces a file by one with arrays and plain values.

    Args:
        path: The file.
        arrays: Arrays of any type without objects.
        info: Values that JSON knows.

    Raises:
        CheckpointError: The system refuses to write.
    """
    specs, offset = {}, 0
    for name, array in arrays.items():
        specs[name] = {"dtype": np.lib.format.dtype_to_descr(array.dtype), "shape": array.shape, "offset": offset}
        offset += -(-array.nbytes // _ALIGNED) * _ALIGNED
    head = json.dumps({"arrays": specs, "info": info}).encode()
    head += b" " * (-(_START + 8 + len(head)) % _ALIGNED)
    parts = [len(head).to_bytes(8, "little"), head]
    for array in arrays.values():
        parts += [np.ascontiguousarray(array).tobytes(), bytes(-array.nbytes % _ALIGNED)]
    digest = _digest(path)
    for part in parts:
        digest.update(part)
    with atomic.replacing(path) as target, open(target, "wb") as file:
        file.write(_MAGIC + sum(map(len, parts)).to_bytes(8, "little") + digest.digest())
        for part in parts:
            file.write(part)


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Returns the arrays of a file, which stay in the file until they are used, and its plain values.

    Returns:
        None if there is no such file, or if it is damaged.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):  # mmap refuses files of no bytes
        return None
    view = memoryview(content)
    length = int.from_bytes(view[len(_MAGIC) : len(_MAGIC) + 8], "little")
    if view[: len(_MAGIC)] != _MAGIC or len(view) != _START + length:
        return None
    digest = _digest(path)
    for start in range(_START, len(view), _BLOCK):
        digest.update(view[start : start + _BLOCK])
    if digest.digest() != view[_START - _DIGEST : _START]:
        return None
    begin = _START + 8 + int.from_bytes(view[_START : _START + 8], "little")
    head = json.loads(bytes(view[_START + 8 : begin]))
    arrays = {}
    for name, spec in head["arrays"].items():
        dtype, shape = np.lib.format.descr_to_dtype(_as_descr(spec["dtype"])), tuple(spec["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(view, dtype, count, begin + spec["offset"]).reshape(shape)
    return arrays, head["info"]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock that one process of all has at a time; a process that ends, in whatever way, gives it back.

    Args:
        path: File of the lock, which is made, and stays.
        wait: Whether to wait for the lock.

    Yields:
        Whether this process has the lock: True after waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _digest(path: Path) -> Any:
    """Returns a hash that differs by the name of the file, so that no file is taken for another."""
    return blake2b(f"{path.parent.name}/{path.name}".encode(), digest_size=_DIGEST)


def _as_descr(descr: Any) -> Any:
    """Returns the description of a type as numpy wants it, which JSON has turned into lists."""
    return [tuple(field) for field in descr] if isinstance(descr, list) else descr
