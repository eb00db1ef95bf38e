"""Reads single structures of a file when they are asked for: extended XYZ, ASE databases, LMDB and trajectories."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from lightning_januspipe.data.checked_files import locked, read_arrays, write_arrays
from lightning_januspipe.data.lmdb_rows import LmdbRows
from lightning_januspipe.data.structures import EXTENDED_XYZ, atoms_of_row, frame_places

_SETTLED = 2_000_000_000
"""A file that was changed less than so many nanoseconds before it was hashed is hashed again the next time."""

_BLOCK = 1 << 24


class FrameFile(Sequence[Atoms]):
    """Is a sequence of the structures in a file, which are read one by one, in any process.

    A subclass overrides :meth:`scan` and :meth:`read`.

    Args:
        path: The file.
        cache: Folder in which the places of the structures, and the hash of the file, are kept.

    Attributes:
        digest: Hash of the content of the file.
        places: Place of each structure in the file.

    Raises:
        ValueError: The file holds no structure, or cannot be read.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        self.path, self._cache = path, cache
        self._opened: tuple[int, Any] | None = None
        self.digest = content_digest(self.content_file, cache)
        self.places = self._find_places()
        if not len(self):
            raise ValueError(f"data file {path} holds no structure; expected at least one")

    @property
    def content_file(self) -> Path:
        """Returns the file that holds the content."""
        return self.path

    def scan(self) -> NDArray[np.int64]:
        """Returns the places of all structures."""
        raise NotImplementedError

    def read(self, opened: Any, index: int) -> Atoms:
        """Reads one structure.

        Args:
            opened: What :meth:`open` has returned in this process.
            index: Index of the structure.
        """
        raise NotImplementedError

    def open(self) -> Any:
        """Opens the file."""
        raise NotImplementedError

    def require_unchanged(self) -> None:
        """Refuses a file that has changed since it was opened.

        Raises:
            ValueError: It has changed.
        """
        if content_digest(self.content_file, self._cache) != self.digest:
            raise ValueError(f"data file {self.path} has changed since the run began; start it again")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Returns one structure.

        Raises:
            ValueError: It cannot be read.
        """
        if self._opened is None or self._opened[0] != os.getpid():  # connections do not survive a fork
            self._opened = os.getpid(), self.open()
        try:
            return self.read(self._opened[1], index)
        except Exception as error:  # the parsers of the formats raise errors of any type
            raise ValueError(f"{self.path}, frame {index} cannot be read ({type(error).__name__}: {error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "places": np.array(self.places)}

    def _find_places(self) -> NDArray[np.int64]:
        kept = self._cache / "frames" / self.digest
        with locked(kept.with_suffix(".lock")):
            found = read_arrays(kept)
            if found is None:
                try:
                    places = self.scan()
                except Exception as error:
                    raise ValueError(f"{self.path} cannot be read ({type(error).__name__}: {error})") from error
                write_arrays(kept, {"places": places}, {})
                found = read_arrays(kept)
        assert found is not None, kept
        return found[0]["places"]


class ExtendedXYZ(FrameFile):
    """Reads extended XYZ; a place is the byte at which a frame begins, and one more place ends the last."""

    def __len__(self) -> int:
        return len(self.places) - 1

    def open(self) -> int:
        """Opens the file."""
        return os.open(self.path, os.O_RDONLY)

    def scan(self) -> NDArray[np.int64]:
        """Returns the places of all frames."""
        return np.array(frame_places(self.path), dtype=np.int64)

    def read(self, opened: int, index: int) -> Atoms:
        """Reads one frame."""
        start, end = self.places[index : index + 2].tolist()
        text = os.pread(opened, end - start, start).decode()
        atoms = ase.io.read(io.StringIO(text), index=0, format="extxyz")
        assert isinstance(atoms, Atoms)
        return atoms


class AseDatabase(FrameFile):
    """Reads an ASE database; a place is the id of a row."""

    def open(self) -> Any:
        """Connects to the database."""
        from ase.db import connect

        database = connect(self.path)
        database.__enter__()  # one connection for all rows
        return database

    def scan(self) -> NDArray[np.int64]:
        """Returns the ids of all rows."""
        rows = self.open().select(sort="id", columns=["id"], include_data=False)
        return np.array([row.id for row in rows], dtype=np.int64)

    def read(self, opened: Any, index: int) -> Atoms:
        """Reads one row."""
        return atoms_of_row(opened.get(id=int(self.places[index])))


class AseLMDB(FrameFile):
    """Reads a database of ASE's rows in LMDB, as fairchem and ase-db-backends write it; a place is the id of a row."""

    @property
    def content_file(self) -> Path:
        """Returns the file that holds the content."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    def open(self) -> LmdbRows:
        """Opens the database for reading."""
        return LmdbRows(self.path)

    def scan(self) -> NDArray[np.int64]:
        """Returns the ids of all rows."""
        return np.array(self.open().ids(), dtype=np.int64)

    def read(self, opened: LmdbRows, index: int) -> Atoms:
        """Reads one row."""
        return atoms_of_row(opened.row(int(self.places[index])))


class AseTrajectory(FrameFile):
    """Reads a trajectory of ASE; a place is an index."""

    def open(self) -> Any:
        """Opens the trajectory."""
        from ase.io.trajectory import Trajectory

        return Trajectory(str(self.path))

    def scan(self) -> NDArray[np.int64]:
        """Returns the indices of all frames."""
        return np.arange(len(self.open()))

    def read(self, opened: Any, index: int) -> Atoms:
        """Reads one frame."""
        return opened[index]


FORMATS: dict[str, type[FrameFile]] = {
    **dict.fromkeys(EXTENDED_XYZ, ExtendedXYZ),
    ".db": AseDatabase,
    ".aselmdb": AseLMDB,
    ".lmdb": AseLMDB,
    ".traj": AseTrajectory,
}
"""The formats that can be read structure by structure, by the ending of the file's name."""


def open_frames(path: Path, cache: Path) -> FrameFile:
    """Opens a file whose structures are read one by one.

    Raises:
        ValueError: The format cannot be read so, or the file holds no structure.
    """
    if path.suffix not in FORMATS:
        raise ValueError(
            f"lazy=True, but {path} cannot be read structure by structure; expected {', '.join(FORMATS)}. Convert it "
            "with `ase convert`, or set lazy=False"
        )
    return FORMATS[path.suffix](path, cache)


def content_digest(path: Path, cache: Path) -> str:
    """Returns the hash of a file, which is computed once as long as its size, time and place on the disk stay.

    Args:
        path: The file.
        cache: Folder in which hashes are kept.
    """
    found = path.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev]
    name = blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
    kept = cache / "digests" / name
    with locked(kept.with_suffix(".lock")):
        known = read_arrays(kept)
        if known is not None and known[1]["state"] == state and known[1]["settled"]:
            return str(known[1]["digest"])
        digest = blake2b(digest_size=20)
        for block in _blocks(path):
            digest.update(block)
        after = path.stat()
        if [after.st_size, after.st_mtime_ns, after.st_ino, after.st_dev] != state:
            raise ValueError(f"data file {path} changes while it is read; wait until it is complete")
        settled = time.time_ns() - found.st_mtime_ns > _SETTLED
        write_arrays(kept, {}, {"state": state, "settled": settled, "digest": digest.hexdigest()})
        return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block
