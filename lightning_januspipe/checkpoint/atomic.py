"""Replaces files and folders at once: they are written under a hidden name, synced to disk, and then renamed.

Whenever the process is killed, a name has its old content or its new content, never a part of it. No two writers share
a hidden name, so two jobs that save under one name leave one of their two checkpoints, whole. A hidden name holds no
part of the name it stands for, because Lightning looks for checkpoints by parts of names.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lightning_januspipe.errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_HIDDEN = re.compile(r"\.januspipe-(?P<name>[0-9a-f]{12})(-[0-9a-f]+)?\.(?P<kind>part|old|gone)")
_ABANDONED = 3600.0
"""Seconds without a write after which a hidden file or folder is taken for one that a killed process left."""
_MOST_ATTEMPTS = 20
_OTHER_JOB = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)
"""What the system answers if another job has replaced or removed the same name in the same instant."""


def hidden(path: Path, kind: str = "part") -> Path:
    """Returns a new hidden name beside a path for its new content ("part"), its old content ("old"), or trash ("gone").

    Each call returns another name, in whichever process and on whichever machine.
    """
    return path.with_name(f".januspipe-{_digest(path)}-{secrets.token_hex(6)}.{kind}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a hidden name to write a file or folder to, which replaces ``path`` after the block.

    Raises:
        CheckpointError: The system refused to write. What was there before stays, and the hidden name is removed.
    """
    part = prepare(path)
    with committing(part, path):
        yield part


def prepare(path: Path) -> Path:
    """Returns a hidden name for the new content of ``path``, makes its folder, and removes what killed processes left.

    Raises:
        CheckpointError: The folder cannot be made.
    """
    with telling(f"{path} could not be saved"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
    return hidden(path)


@contextmanager
def committing(part: Path, path: Path) -> Iterator[None]:
    """Puts ``part`` in the place of ``path`` after the block, or removes it if the block or the replacement fails.

    Raises:
        CheckpointError: The system refused to write.
    """
    try:
        with telling(f"{path} could not be saved"):
            yield
            _commit(part, path)
    except BaseException:
        discard(part)
        raise


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turns an error of the operating system in the block into one with a path and the reason in it.

    Args:
        what: What could not be done, with the path.

    Raises:
        CheckpointError: There was such an error.
    """
    try:
        yield
    except Exception as error:
        cause = system_error(error)
        if cause is None or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what}: {cause.strerror or cause}. What was saved before is unchanged.") from error


def system_error(error: BaseException | None) -> OSError | None:
    """Returns the error of the operating system that an error hides: torch writes over "No space left on device"."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def write(value: Any, file: Path) -> None:
    """Saves a value as ``torch.save`` does; through a Python file, which tells why the system refuses to write."""
    with open(file, "wb") as stream:
        torch.save(value, stream)


def recover(path: Path) -> None:
    """Puts the old content of ``path`` back, if the process was killed just when it was being replaced."""
    if os.path.lexists(path):
        return
    olds = [p for p in path.parent.glob(f".januspipe-{_digest(path)}*.old") if _HIDDEN.fullmatch(p.name)]
    for old in sorted(olds, key=lambda p: p.stat().st_mtime, reverse=True)[:1]:
        with suppress(FileNotFoundError):  # another job has put it back
            os.rename(old, path)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder; never leaves a part of a folder under its name.

    Raises:
        CheckpointError: The system refused.
    """
    with telling(f"{path} could not be removed"), suppress(FileNotFoundError):  # another job may have removed it
        if path.is_dir() and not path.is_symlink():
            gone = hidden(path, "gone")
            os.rename(path, gone)
            discard(gone)
        else:
            path.unlink()


def _commit(part: Path, path: Path) -> None:
    """Syncs a file or folder to disk and puts it in the place of ``path``."""
    _sync(part)
    for attempt in range(_MOST_ATTEMPTS):
        try:
            _replace(part, path)
            break
        except OSError as error:
            if error.errno not in _OTHER_JOB or attempt == _MOST_ATTEMPTS - 1 or not part.exists():
                raise
    _sync_folder(path.parent)


def _replace(part: Path, path: Path) -> None:
    if not os.path.lexists(path) or not (part.is_dir() or (path.is_dir() and not path.is_symlink())):
        os.replace(part, path)
    elif _exchange(part, path):
        discard(part)
    else:  # a file system that cannot exchange: for an instant there is nothing at path; see recover
        old = hidden(path, "old")
        os.rename(path, old)
        try:
            os.rename(part, path)
        except OSError:
            if not os.path.lexists(path):
                os.rename(old, path)
            raise
        finally:
            if os.path.lexists(path):
                discard(old)


def discard(path: Path) -> None:
    """Deletes a hidden file, folder or link; what the system does not let go of now is removed by age later."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_abandoned(path: Path) -> None:
    """Deletes hidden files and folders beside ``path`` that nobody has written to for long.

    The old content of a name is kept while there is nothing under the name; see :func:`recover`.
    """
    for found in list(path.parent.iterdir()):
        match = _HIDDEN.fullmatch(found.name)
        if match is None or (match["kind"] == "old" and (match["name"] != _digest(path) or not os.path.lexists(path))):
            continue
        with suppress(OSError):  # another job may delete it meanwhile
            inner = list(found.iterdir()) if found.is_dir() and not found.is_symlink() else []
            if time.time() - max(p.lstat().st_mtime for p in (found, *inner)) > _ABANDONED:
                discard(found)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.name.encode()).hexdigest()[:12]


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
