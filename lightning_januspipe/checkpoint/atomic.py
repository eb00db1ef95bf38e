"""Files and folders that are replaced at once: written under a hidden name beside, synced to disk, then renamed.

Whenever the process is killed, there is the old content under a name, or the new one, never a part of it. Hidden names
hold nothing of the name they stand for: Lightning looks for checkpoints by parts of names.
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
    """The name beside a path under which it is written ("part"), kept for a moment ("old"), or deleted ("gone")."""
    return path.with_name(f".januspipe-{hashlib.sha1(path.name.encode()).hexdigest()[:12]}.{kind}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file or folder to; after the block it replaces what is at ``path``.

    What an earlier process that was killed has left under that name is deleted.
    """
    part = prepare(path)
    yield part
    commit(part, path)


def prepare(path: Path) -> Path:
    """A free name to write the new content of ``path`` to, in a folder that exists."""
    part = hidden(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    delete(part)
    return part


def commit(part: Path, path: Path) -> None:
    """Sync a file or folder to disk and put it in the place of ``path``, whatever is there."""
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
    """Put back what was at ``path`` if the process was killed just when it was to be replaced."""
    old = hidden(path, "old")
    if not os.path.lexists(path) and old.exists():
        os.rename(old, path)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder; never leaves a part of a folder under its name."""
    if path.is_dir() and not path.is_symlink():
        gone = hidden(path, "gone")
        delete(gone)
        os.rename(path, gone)
        path = gone
    delete(path)


def delete(path: Path) -> None:
    """Delete a file, a link (not what it points to), a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, where the operating and the file system can."""
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
