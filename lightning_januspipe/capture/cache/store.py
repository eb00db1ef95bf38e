"""Keeps on disk what a start of a job has made, such as captured programs, so that a second start makes nothing."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar, cast

from lightning_januspipe.capture.trace.program import Program

VARIABLE = "JANUSPIPE_CACHE"
"""Environment variable with the folder of the cache; ``0``, ``off`` or nothing for no cache."""

_Kept = TypeVar("_Kept")

_MOST_ENTRIES = 64
_LONGEST_WRITE = 24 * 3600.0  # seconds after which a file that a killed process left half written is removed


@dataclass(frozen=True)
class Words:
    """Holds the words for what a cache keeps, in its warnings.

    Attributes:
        kept: what a file holds, as a noun.
        again: what happens without a file, as a clause.
        every_start: the same at every start.
    """

    kept: str
    again: str
    every_start: str


class FileCache(Generic[_Kept]):
    """Stores objects of one class in a folder, one file for each key.

    A file is written whole or not at all, so that processes may share the folder. Of more than 64 files the oldest are
    removed. An object is stored with pickle, and unpickling a file runs code that its writer put into it. So a folder
    or file that belongs to another user, or that others may write to, is never read. A full disk or a damaged file
    causes a warning, and the object is made once more.

    Args:
        folder: the folder, which is made with the first file, for this user alone. None for no cache.

    Attributes:
        suffix: ends the names of the files.
        magic: begins their content.
        kind: the class of the objects.
        words: the words for them.
    """

    suffix: ClassVar[str]
    magic: ClassVar[bytes]
    kind: ClassVar[type]
    words: ClassVar[Words]

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def has(self, key: str) -> bool:
        """Tells whether there is a file of a key, which may turn out to be of no use."""
        return self.folder is not None and self._path(key).exists()

    def load(self, key: str) -> _Kept | None:
        """Returns the object of a key; None where there is none.

        Args:
            key: letters and digits that tell this object from all others.
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
            _warn(f"{path} cannot be read ({error}); {self.words.again}")
            return None
        try:
            found = self._unpacked(key, content)
        except Exception as error:  # a damaged pickle may raise anything
            _warn(f"{path} is damaged ({type(error).__name__}: {error}) and removed; {self.words.again}")
            self.discard(key)
            return None
        with suppress(OSError):
            os.utime(path)  # the file that was used last is removed last
        return found

    def save(self, key: str, value: _Kept) -> None:
        """Stores an object.

        Args:
            key: letters and digits that tell this object from all others.
            value: the object that was made for this key.
        """
        if self.folder is None:
            return
        try:
            content = self._packed(key, value)
        except Exception as error:  # it may hold objects of the user's, which may refuse in any way
            reason = f"{type(error).__name__}: {error}"
            _warn(f"{self.words.kept} cannot be stored ({reason}); {self.words.every_start}")
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_safe(self.folder):
                with _written_whole(self._path(key)) as descriptor, open(descriptor, "wb") as file:
                    file.write(content)
                self._prune()
        except OSError as error:
            _warn(f"{self.words.kept} cannot be stored in {self.folder} ({error}); {self.words.every_start}")

    def discard(self, key: str) -> None:
        """Removes the file of a key, if there is one."""
        if self.folder is not None:
            with suppress(OSError):
                self._path(key).unlink()

    def _path(self, key: str) -> Path:
        assert self.folder is not None and key.isalnum(), key
        return self.folder / f"{key}{self.suffix}"

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
                if path.suffix == self.suffix:
                    ages.append((age, path))
                elif path.suffix == ".tmp" and path.name.startswith(".") and age > _LONGEST_WRITE:
                    path.unlink()
        for _, path in sorted(ages)[_MOST_ENTRIES:]:
            with suppress(OSError):
                path.unlink()

    def _portable(self, value: _Kept) -> _Kept:
        """Returns an object as it is stored."""
        return value

    def _packed(self, key: str, value: _Kept) -> bytes:
        payload = pickle.dumps(self._portable(value), protocol=4)
        return self.magic + _checksum(key, payload) + payload

    def _unpacked(self, key: str, content: bytes) -> _Kept:
        start = len(self.magic) + hashlib.sha256().digest_size
        payload = content[start:]
        if content[:start] != self.magic + _checksum(key, payload):
            raise ValueError("its checksum is wrong")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            found = pickle.loads(payload)
        if not isinstance(found, self.kind):
            raise TypeError(f"it holds a {type(found).__name__}")
        return cast(_Kept, found)


class ProgramCache(FileCache[Program]):
    """Stores captured programs, with their constants on the CPU.

    The key is the digest of a :class:`~lightning_januspipe.capture.cache.key.ProgramKey`.
    """

    suffix = ".program"
    magic = b"januspipe program 1\n"
    kind = Program
    words = Words("a traced potential", "the potential is traced again", "every start traces it again")

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

    def _portable(self, value: Program) -> Program:
        constants = {name: constant.detach().cpu() for name, constant in value.constants.items()}
        return replace(value, constants=constants)


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
