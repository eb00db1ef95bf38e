"""Reads rows of ASE in LMDB: JSON compressed by zlib, under their ids, as fairchem and ase-db-backends write them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

LMDB = (".aselmdb", ".lmdb")
"""Endings of the names of such databases, which are a file or a folder."""


class LmdbRows:
    """Reads the rows of a database.

    Args:
        path: The file, or the folder with a file ``data.mdb``.

    Raises:
        ImportError: The package lmdb is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(f"{path} is an LMDB database; to read it: pip install lmdb") from error
        self._open, self._path = lmdb.open, path

    def ids(self) -> list[int]:
        """Returns the ids of all rows, in ascending order.

        Raises:
            ValueError: The database holds no rows of ASE.
        """
        with self._opened() as database, database.begin() as transaction:
            names = [bytes(name) for name in transaction.cursor().iternext(values=False)]
            found = {int(name) for name in names if name.isdigit()}
            if found and b"nextid" not in names:
                raise ValueError("it has no entry 'nextid', as databases of ASE's rows have")
            deleted = transaction.get(b"deleted_ids")
        return sorted(found - set(map(int, [] if deleted is None else _decoded(deleted))))

    def row(self, identity: int) -> Any:
        """Returns the row with an id.

        Raises:
            ValueError: There is none.
        """
        from ase.db.row import AtomsRow

        with self._opened() as database, database.begin() as transaction:
            content = transaction.get(str(identity).encode())
        if content is None:
            raise ValueError(f"there is no row {identity}")
        return AtomsRow(_decoded(content) | {"id": identity})

    def _opened(self) -> Any:
        """Opens the database for one call, because a process may have it open only once at a time."""
        try:
            # Without a lock file the folder may be read-only; nobody may write to the database meanwhile.
            return self._open(str(self._path), subdir=self._path.is_dir(), readonly=True, lock=False, readahead=False)
        except Exception as error:
            if "already open in this process" in str(error):
                raise ValueError("this process has it open: close the connection that has written it") from error
            raise


def _decoded(content: bytes) -> Any:
    from ase.io.jsonio import decode

    return decode(zlib.decompress(content).decode())
