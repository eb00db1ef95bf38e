"""Keeps the samples of a file on disk: neighbour lists, labels and facts, which all ranks and jobs make once.

The structures of a file are dealt out to chunks. A process that finds no cache makes the chunks that no other process
is making, and waits for those that others make. Each chunk is a file of records, one for each structure, and a file of
facts and of the places of the records. At the end the facts of all chunks are joined in a table.

A record has a checksum, which is verified whenever it is read. A chunk that is damaged or missing is made anew.
"""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase import Atoms
from lightning_utilities.core.rank_zero import rank_zero_info
from numpy.typing import NDArray

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.data.checked_files import locked, read_arrays, write_arrays
from lightning_januspipe.data.facts import Facts
from lightning_januspipe.data.facts_table import FactsTable, StructureKind, frame_name
from lightning_januspipe.data.frames import FrameFile
from lightning_januspipe.data.labels import LabelKeys
from lightning_januspipe.data.structures import StructureArrays, structure_arrays

CHUNK_SIZE = 4096
"""Structures in a chunk."""

RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("checksum", "<u4"), ("wide", "?")])
"""Place of a structure's record in the file of its chunk; ``wide`` says that cell shifts have 16 bits instead of 8."""

_MOST_OPEN = 64  # files that a process has open at once
_SOURCES = ("structures", "labels", "neighbors", "units", "facts", "facts_table", "frames", "sample_cache", "tasks")
"""Files of this folder on whose code the content of a cache depends."""


@dataclass(frozen=True)
class SampleRecipe:
    """Holds what the samples of a file depend on beside its content.

    Attributes:
        cutoff: Cutoff of the neighbour lists in Å.
        labels: Names and units of the labels.
        require_labels: Whether each structure must have energy and forces.
        weight_key: Name in ``Atoms.info`` of a factor of the structure's loss; None for none.
    """

    cutoff: float
    labels: LabelKeys
    require_labels: bool
    weight_key: str | None

    def key(self, content: str) -> str:
        """Returns the name of the cache for a file with a hash of its content."""
        digest = blake2b(digest_size=16)
        for name in _SOURCES:
            digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
        digest.update(repr((content, asdict(self), ase.__version__)).encode())
        return digest.hexdigest()

    def arrays(self, atoms: Atoms, index: int, source: str) -> tuple[StructureArrays, Facts]:
        """Returns what the sample of a structure is made of, and facts about the structure.

        Args:
            atoms: The structure.
            index: Its index in the dataset.
            source: File of the structure in messages, or "".

        Raises:
            ValueError: The structure, its labels or its weight are not usable.
        """
        name = frame_name(source, index)
        arrays = structure_arrays(atoms, self.cutoff, self.labels, require_labels=self.require_labels, source=name)
        return arrays, Facts.of(index, atoms, arrays, self.labels, self._own_weight(atoms, name))

    def _own_weight(self, atoms: Atoms, name: str) -> float:
        own = atoms.info.get(self.weight_key, 1.0) if self.weight_key is not None else 1.0
        try:
            weight = float(own)
        except (TypeError, ValueError):
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"{name} has the weight {own!r} under {self.weight_key!r}; expected a number of at least 0"
            )
        return weight


class SampleCache:
    """Gives the samples of a file from the disk, and makes them there if they are missing.

    Args:
        frames: The file.
        recipe: What the samples depend on.
        root: Folder of all caches.
        chunk_size: Structures in a chunk.

    Attributes:
        folder: Folder of this file's cache.
        table: Facts about all structures.

    Raises:
        ValueError: A structure or its labels are not usable.
        CheckpointError: The system refuses to write.
    """

    def __init__(self, frames: FrameFile, recipe: SampleRecipe, root: Path, chunk_size: int = CHUNK_SIZE) -> None:
        self._frames, self._recipe, self._chunk_size = frames, recipe, chunk_size
        self.folder = root / f"{recipe.key(frames.digest)}-{chunk_size}"
        self._files: OrderedDict[int, int] = OrderedDict()
        if not self._load():
            self._build()

    def __len__(self) -> int:
        """Returns the number of structures."""
        return len(self._frames)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to a process: open files, and tables that stay in their file."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "table", "_records")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = OrderedDict()
        if not self._load():
            self._build()

    def arrays(self, index: int) -> StructureArrays:
        """Returns what the sample of a structure is made of.

        Raises:
            ValueError: The record is damaged, and the file is no longer the one that it was made from.
        """
        content = self._content(index)
        if content is None:
            self._repair(index)
            content = self._content(index)
        if content is None:
            raise ValueError(f"{self._samples_file(self._chunk_of(index))} cannot be read; remove {self.folder}")
        return _unpacked(content, self.table.rows[index], bool(self._records["wide"][index]))

    def _content(self, index: int) -> bytes | None:
        """Returns the record of a structure; None if it is missing or damaged."""
        record, chunk = self._records[index], self._chunk_of(index)
        if chunk not in self._files:
            try:
                self._files[chunk] = os.open(self._samples_file(chunk), os.O_RDONLY)
            except FileNotFoundError:
                return None
            if len(self._files) > _MOST_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(chunk)
        content = os.pread(self._files[chunk], int(record["size"]), int(record["offset"]))
        is_whole = len(content) == record["size"] and zlib.crc32(content) == record["checksum"]
        return content if is_whole else None

    def _repair(self, index: int) -> None:
        """Makes the chunk of a structure anew, unless another process has done so."""
        chunk = self._chunk_of(index)
        with locked(self._lock_file(chunk)):
            self._close(chunk)
            if self._content(index) is not None:
                return
            warnings.warn(f"{self._samples_file(chunk)} is damaged, and is made anew", stacklevel=4)
            self._close(chunk)
            self._frames.require_unchanged()
            self._write_chunk(chunk)

    def _close(self, chunk: int) -> None:
        if chunk in self._files:
            os.close(self._files.pop(chunk))

    def _chunk_of(self, index: int) -> int:
        return index // self._chunk_size

    def _num_chunks(self) -> int:
        return -(-len(self) // self._chunk_size)

    def _samples_file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.samples"

    def _facts_file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.facts"

    def _lock_file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.lock"

    def _load(self) -> bool:
        """Reads the table; returns whether it is there and whole, and the files of all chunks have their sizes."""
        found = read_arrays(self.folder / "table")
        if found is None:
            return False
        arrays, info = found
        sizes = [self._size(chunk) for chunk in range(self._num_chunks())]
        if sizes != info["sizes"]:
            return False
        self.table = FactsTable(arrays["rows"], arrays["elements"], _kinds_of(info), [str(self._frames.path)])
        self._records = arrays["records"]
        return True

    def _size(self, chunk: int) -> int:
        try:
            return self._samples_file(chunk).stat().st_size
        except FileNotFoundError:
            return -1

    def _build(self) -> None:
        """Makes the chunks that no other process makes, waits for the others, and joins their facts."""
        began, made = time.monotonic(), 0
        missing = [chunk for chunk in range(self._num_chunks()) if self._chunk(chunk) is None]
        if missing:
            rank_zero_info(f"{self._frames.path}: {len(self)} structures are read once, and kept in {self.folder}")
        while missing := [chunk for chunk in missing if self._chunk(chunk) is None]:
            before = made
            for chunk in missing:
                with locked(self._lock_file(chunk), wait=False) as is_mine:
                    if is_mine and self._chunk(chunk) is None:
                        self._write_chunk(chunk)
                        made += 1
            if made == before:
                time.sleep(0.1)
        with locked(self.folder / "table.lock"):
            if not self._load():
                self._join()
        if not self._load():
            raise ValueError(f"{self.folder} cannot be read; remove it")
        if made:
            rank_zero_info(f"{self._frames.path}: read in {time.monotonic() - began:.1f} s")

    def _chunk(self, chunk: int) -> tuple[FactsTable, NDArray[np.void]] | None:
        """Returns the facts and the places of the records of a chunk; None if it is missing or damaged."""
        found = read_arrays(self._facts_file(chunk))
        if found is None or self._size(chunk) != found[1]["size"]:
            return None
        arrays, info = found
        return FactsTable(arrays["rows"], arrays["elements"], _kinds_of(info)), arrays["records"]

    def _write_chunk(self, chunk: int) -> None:
        source = str(self._frames.path)
        facts, records, offset = [], [], 0
        with atomic.replacing(self._samples_file(chunk)) as target, open(target, "wb") as file:
            for index in range(chunk * self._chunk_size, min((chunk + 1) * self._chunk_size, len(self))):
                arrays, fact = self._recipe.arrays(self._frames[index], index, source)
                content, wide = _packed(arrays, fact)
                file.write(content)
                facts.append(fact)
                records.append((offset, len(content), zlib.crc32(content), wide))
                offset += len(content)
        table = FactsTable.of(facts)
        arrays_of = {"rows": table.rows, "elements": table.elements, "records": np.array(records, dtype=RECORD)}
        write_arrays(self._facts_file(chunk), arrays_of, {"kinds": table.kinds, "size": offset})

    def _join(self) -> None:
        found = [self._chunk(chunk) for chunk in range(self._num_chunks())]
        whole = [one for one in found if one is not None]
        assert len(whole) == len(found), "each chunk was there a moment ago"
        table = FactsTable.joined([facts for facts, _ in whole])
        records = np.concatenate([places for _, places in whole])
        arrays = {"rows": table.rows, "elements": table.elements, "records": records}
        sizes = [self._size(chunk) for chunk in range(self._num_chunks())]
        write_arrays(self.folder / "table", arrays, {"kinds": table.kinds, "sizes": sizes})


def default_root() -> Path:
    """Returns the folder of all caches: ``lightning_januspipe/structures`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_januspipe" / "structures"


def _kinds_of(info: Mapping[str, Any]) -> list[StructureKind]:
    return [
        StructureKind(is_periodic, said, electrons, tuple(conditions), tuple(names))
        for is_periodic, said, electrons, conditions, names in info["kinds"]
    ]


def _source_dtype(num_atoms: int) -> str:
    """Returns the type of atom indices in the record of a structure."""
    return "<u2" if num_atoms <= 1 << 16 else "<u4"


def _packed(arrays: StructureArrays, facts: Facts) -> tuple[bytes, bool]:
    """Returns the record of a structure, and whether its cell shifts have 16 bits."""
    num_atoms = facts.num_atoms
    largest = int(np.abs(arrays.cell_shifts).max(initial=0))
    if largest > np.iinfo(np.int16).max:
        raise ValueError(f"a cell shift of {largest} cells; expected positions nearer to the cell")
    wide = largest > np.iinfo(np.int8).max
    source, target = arrays.edge_index
    parts = [
        np.array([arrays.energy, *arrays.cell.ravel(), *arrays.stress.ravel()], dtype="<f8"),
        arrays.positions.astype("<f8"),
        arrays.forces.astype("<f8"),
        np.bincount(target, minlength=num_atoms).astype("<u4"),
        source.astype(_source_dtype(num_atoms)),
        arrays.cell_shifts.astype("<i2" if wide else "i1"),
        arrays.numbers.astype("u1"),
        arrays.pbc.astype("?"),
    ]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts), wide


def _unpacked(content: bytes, row: Any, wide: bool) -> StructureArrays:
    """Returns what :func:`_packed` has packed, as new arrays."""
    num_atoms, num_edges, position = int(row["num_atoms"]), int(row["num_edges"]), 0

    def take(dtype: str, *shape: int) -> NDArray[Any]:
        nonlocal position
        count = int(np.prod(shape))
        found = np.frombuffer(content, dtype, count, position).reshape(shape)
        position += found.nbytes
        return found

    values = take("<f8", 19)
    positions, forces = take("<f8", num_atoms, 3), take("<f8", num_atoms, 3)
    target = np.repeat(np.arange(num_atoms), take("<u4", num_atoms))
    source = take(_source_dtype(num_atoms), num_edges).astype(np.int64)
    return StructureArrays(
        positions=positions,
        forces=forces,
        energy=float(values[0]),
        cell=values[1:10].reshape(3, 3),
        stress=values[10:].reshape(3, 3),
        edge_index=np.stack([source, target]),
        cell_shifts=take("<i2" if wide else "i1", num_edges, 3).astype(np.int64),
        numbers=take("u1", num_atoms).astype(np.int64),
        pbc=take("?", 3),
    )
