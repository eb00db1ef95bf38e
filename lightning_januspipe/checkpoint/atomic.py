"""Replaces files and folders at once: they are written under a hidden name, synced to disk, and then renamed.

Whenever the process is killed, a name has its old content or its new content, never a part of it. A hidden name holds
no part of the name it stands for, because Lightning looks for checkpoints by parts of names.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def hidden(path: Path, kind: str = "part") -> Path:
    """Returns a hidden name beside a path for its new content ("part"), its old content ("old"), or trash ("gone")."""
    return path.with_name(f".januspipe-{hashlib.sha1(path.name.encode()).hexdigest()[:12]}.{kind}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden name to write a file or folder to, which replaces ``path`` after the block.

    If a process was killed before and left something under the hidden name, it is deleted.
    """
    part = prepare(path)
    yield part
    commit(part, path)


def prepare(path: Path) -> Path:
    """Returns a hidden name for the new content of ``path``, free to write to, and makes its folder."""
    part = hidden(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    delete(part)
    return part


def commit(part: Path, path: Path) -> None:
    """Syncs a file or folder to disk and puts it in the place of ``path``."""
    _sync(part)
    if not os.path.lexists(path) or not (part.is_dir() or (path.is_dir() and not path.is_symlink())):
        os.replace(part, path)
    elif _exchange(part, path):
        delete(part)
    else:  # a file system that cannot exchange: for an instant there is nothing at path; see recover
        old = hidden(path, "old")
        delete(old)
        os.rename(path, old)
        os.rename(part, path)
        delete(old)
    _sync_folder(path.parent)


def recover(path: Path) -> None:
    """Puts the old content of ``path`` back, if the process was killed just when it was being replaced."""
    old = hidden(path, "old")
    if not os.path.lexists(path) and old.exists():
        os.rename(old, path)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder; never leaves a part of a folder under its name."""
    if path.is_dir() and not path.is_symlink():
        gone = hidden(path, "gone")
        delete(gone)
        os.rename(path, gone)
        path = gone
    delete(path)


def delete(path: Path) -> None:
    """Deletes a file, a folder, or a link but not its target; does nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; returns False where the operating system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
        _sync_folder(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
