"""Verifies that checkpoints are whole, before anything in them is used.

A file of ``torch.save`` is a zip archive with a checksum of each of its parts, which ``torch.load`` does not look at. A
folder has a file ``checksums.json`` with size and checksum of each of its files.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lightning_januspipe.errors import CheckpointError

CHECKSUMS = "checksums.json"
_CHUNK = 2**24  # bytes that are read at once
_END_RECORD = 22  # bytes at the end of an archive
_ARCHIVE, _PICKLE = b"PK\x03\x04", b"\x80"
"""How files of ``torch.save`` begin; those in its format before 1.6 are pickles."""

_TO_DO = "Take another checkpoint, or copy this one again from where it is whole."

Checksum = tuple[int, str]
"""Number of bytes of a file, and its CRC-32 in hexadecimal digits."""


def checksum(file: Path) -> Checksum:
    """Returns size and checksum of a file."""
    size = value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            value = zlib.crc32(chunk, value)
    return size, f"{value:08x}"


def write_checksums(folder: Path, known: Mapping[str, Checksum], others: Iterable[str]) -> None:
    """Writes the checksums of a checkpoint folder.

    Args:
        folder: The folder, whose files are complete.
        known: Checksums of files, by name.
        others: Names of further files, which are read.
    """
    found = dict(known) | {name: checksum(folder / name) for name in others}
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1, sort_keys=True))


def require_checkpoint(file: Path) -> None:
    """Verifies by its first bytes that a file was written by ``torch.save``; an empty one may be cut off.

    Raises:
        CheckpointError: The file is something else, such as a text.
    """
    with open(file, "rb") as stream:
        start = stream.read(len(_ARCHIVE))
    if start and not start.startswith((_ARCHIVE, _PICKLE)) and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is no checkpoint: torch.save has not written it. Check the path.")


def is_archive(file: Path) -> bool:
    """Returns whether a file is a zip archive, as ``torch.save`` writes it since 1.6."""
    with open(file, "rb") as stream:
        return stream.read(len(_ARCHIVE)) == _ARCHIVE or zipfile.is_zipfile(file)


def verify_file(file: Path) -> None:
    """Verifies that a file of ``torch.save`` is whole; files in torch's format before 1.6 are only opened.

    Raises:
        CheckpointError: The file is empty, cut off or changed, or is no checkpoint.
    """
    require_checkpoint(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(len(_ARCHIVE))
        stream.seek(max(0, size - _END_RECORD))
        end = stream.read()
    if not size:
        raise CheckpointError(f"the checkpoint {file} is empty: its writing was interrupted. {_TO_DO}")
    if not is_archive(file):
        return
    try:
        if not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):  # torch writes no comment behind it
            raise ValueError("its end is damaged or missing")
        torch._C.PyTorchFileReader(str(file))  # stricter than zipfile about the directory of an archive
        with zipfile.ZipFile(file) as archive:
            # Without checksums of its own, torch writes files that no other program can verify.
            part = archive.testzip() if torch.serialization.get_crc32_options() else None
    except Exception as error:  # whatever damaged bytes make the reader of archives do
        raise CheckpointError(
            f"the checkpoint {file} is cut off or damaged ({size} bytes; {error}). {_TO_DO}"
        ) from error
    if part is not None or start != _ARCHIVE:
        raise CheckpointError(
            f"the checkpoint {file} is damaged: the checksum of its part {part or 'header'!r} is wrong. {_TO_DO}"
        )


def verify_folder(folder: Path) -> None:
    """Verifies that the files of a checkpoint folder are whole, if it was saved with their checksums.

    Raises:
        CheckpointError: A file is missing, cut off or changed.
    """
    for name, (size, value) in sorted(read_checksums(folder).items()):
        require_file(folder, name, size)
        if checksum(folder / name) != (size, value):
            raise CheckpointError(f"the checkpoint {folder} is damaged: the checksum of {name} is wrong. {_TO_DO}")


def require_file(folder: Path, name: str, size: int, or_more: bool = False) -> None:
    """Verifies that a file of a checkpoint folder is there and has all its bytes.

    Args:
        folder: The folder that should have the file.
        name: Name of the file.
        size: Its number of bytes.
        or_more: Whether it may have more bytes.

    Raises:
        CheckpointError: It is missing, or its size is wrong.
    """
    if not (folder / name).is_file():
        raise CheckpointError(f"the checkpoint {folder} is incomplete: its file {name} is missing. {_TO_DO}")
    found = (folder / name).stat().st_size
    if found < size or (found > size and not or_more):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: its file {name} has {found} bytes instead of {size}. {_TO_DO}"
        )


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """Returns the checksums of a checkpoint folder by file; none, if it was saved without.

    Raises:
        CheckpointError: The file of the checksums is damaged.
    """
    file = folder / CHECKSUMS
    if not file.exists():
        return {}
    try:
        return {str(name): (int(size), str(value)) for name, (size, value) in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: its file {CHECKSUMS} is no JSON. {_TO_DO}"
        ) from error
