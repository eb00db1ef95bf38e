"""Keeps captured programs on disk, so that a second start of a job traces nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lightning_januspipe.capture.trace.program import Program

VARIABLE = "JANUSPIPE_CACHE"
"""Environment variable with the folder of the cache; ``0``, ``off`` or nothing for no cache."""

_SUFFIX = ".program"
_MAGIC = b"januspipe program 1\n"
_MOST_ENTRIES = 64
_LONGEST_WRITE = 24 * 3600.0  # seconds after which a file that a killed process left half written is removed


class ProgramCache:
    """Stores captured programs in a folder, one file for each key.

    A file is written whole or not at all, so that processes may share the folder. Of more than 64 files the oldest are
    removed. A program is stored with pickle, and unpickling a file runs code that its writer put into it. So a folder
    or file that belongs to another user, or that others may write to, is never read. A full disk or a damaged file
    causes a warning, and one more trace.

    Args:
        folder: the folder, which is made with the first file, for this user alone. None for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> ProgramCache:
        """Returns the cache that the environment variable ``JANUSPIPE_CACHE`` names.

        It is a folder, or ``0``, ``off`` or nothing to switch the cache off. Without the variable the folder is
        ``lightning_januspipe/programs`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        """
        given = os.environ.get(VARIABLE)
        if given is not None:
            off = given.strip().lower() in ("", "0", "off")
            return cls(None if off else Path(given).expanduser())
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(caches).expanduser()
        return cls(folder / "lightning_januspipe" / "programs" if folder.is_absolute() else None)

    def subfolder(self, name: str) -> Path | None:
        """Returns a folder inside the cache for files of another kind, made for this user alone; None for no cache.

        Args:
            name: name of the folder.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            _warn(f"the folder {path} cannot be made ({error}); nothing is kept there")
            return None
        return path if self._is_safe(self.folder) and self._is_safe(path) else None

    def load(self, key: str) -> Program | None:
        """Returns the program of a key, with its constants on the CPU; None where there is none.

        Args:
            key: the digest of a :class:`~lightning_januspipe.capture.cache.key.ProgramKey`.
        """
        if self.folder is None or not self._is_safe(self.folder):
            return None
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with open(descriptor, "rb") as file:
                if _others(os.fstat(file.fileno())):
                    _warn(f"{path} is not read: {_others(os.fstat(file.fileno()))}. Remove it.")
                    return None
                content = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(f"{path} cannot be read ({error}); the potential is traced again")
            return None
        try:
            program = _unpacked(key, content)
        except Exception as error:  # a damaged pickle may raise anything
            _warn(f"{path} is damaged ({type(error).__name__}: {error}) and removed; the potential is traced again")
            self.discard(key)
            return None
        with suppress(OSError):
            os.utime(path)  # the file that was used last is removed last
        return program

    def save(self, key: str, program: Program) -> None:
        """Stores a program.

        Args:
            key: the digest of a :class:`~lightning_januspipe.capture.cache.key.ProgramKey`.
            program: the program that was traced for this key.
        """
        if self.folder is None:
            return
        try:
            content = _packed(key, program)
        except Exception as error:  # outputs may hold objects of the user's, which may refuse in any way
            _warn(f"a traced potential cannot be stored ({type(error).__name__}: {error}); every start traces it again")
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_safe(self.folder):
                with _written_whole(self._path(key)) as descriptor, open(descriptor, "wb") as file:
                    file.write(content)
                self._prune()
        except OSError as error:
            _warn(f"a traced potential cannot be stored in {self.folder} ({error}); every start traces it again")

    def discard(self, key: str) -> None:
        """Removes the program of a key, if there is one."""
        if self.folder is not None:
            with suppress(OSError):
                self._path(key).unlink()

    def _path(self, key: str) -> Path:
        assert self.folder is not None and key.isalnum(), key
        return self.folder / f"{key}{_SUFFIX}"

    def _is_safe(self, folder: Path) -> bool:
        try:
            problem = _others(folder.stat())
        except FileNotFoundError:
            return False
        except OSError as error:
            problem = str(error)
        if problem:
            _warn(
                f"the folder {folder} is not used: {problem}. Name another folder in the environment variable "
                f"{VARIABLE}, or switch the cache off with {VARIABLE}=0."
            )
        return not problem

    def _prune(self) -> None:
        """Removes all but the newest files, and files that killed processes left."""
        assert self.folder is not None
        ages: list[tuple[float, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may remove it meanwhile
                age = time.time() - path.lstat().st_mtime
                if path.suffix == _SUFFIX:
                    ages.append((age, path))
                elif path.suffix == ".tmp" and path.name.startswith(".") and age > _LONGEST_WRITE:
                    path.unlink()
        for _, path in sorted(ages)[_MOST_ENTRIES:]:
            with suppress(OSError):
                path.unlink()


def _packed(key: str, program: Program) -> bytes:
    constants = {name: value.detach().cpu() for name, value in program.constants.items()}
    payload = pickle.dumps(replace(program, constants=constants), protocol=4)
    return _MAGIC + _checksum(key, payload) + payload


def _unpacked(key: str, content: bytes) -> Program:
    start = len(_MAGIC) + hashlib.sha256().digest_size
    payload = content[start:]
    if content[:start] != _MAGIC + _checksum(key, payload):
        raise ValueError("its checksum is wrong")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        program = pickle.loads(payload)
    if not isinstance(program, Program):
        raise TypeError(f"it holds a {type(program).__name__}")
    return program


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()


@contextmanager
def _written_whole(path: Path) -> Iterator[int]:
    """Yields a temporary file to write to, which takes the place of ``path`` after the block."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        yield descriptor
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _others(found: os.stat_result) -> str:
    """Returns, in words, who else could have written a file or folder; nothing if nobody could."""
    if not hasattr(os, "getuid"):  # systems without such owners
        return ""
    if found.st_uid != os.getuid():
        return f"it belongs to the user {found.st_uid}, not to {os.getuid()}, and a stored program can run code"
    if stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it (chmod go-w), and a stored program can run code"
    return ""


def _warn(text: str) -> None:
    warnings.warn(f"januspipe's cache: {text}", stacklevel=3)
