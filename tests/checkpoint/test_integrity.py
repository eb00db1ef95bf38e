"""Checkpoints that are damaged: each is refused with its path and what is wrong with it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_januspipe.checkpoint.atomic import write
from lightning_januspipe.checkpoint.index import INDEX
from lightning_januspipe.checkpoint.integrity import CHECKSUMS, verify_file
from lightning_januspipe.checkpoint.sharded import META, finish_folder, read_folder, write_shards
from lightning_januspipe.errors import CheckpointError

SHARD = "__0_0.distcp"


def flip(file: Path, place: float) -> None:
    """Flips the bits of one byte."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path, keep: float) -> None:
    os.truncate(file, int(keep * file.stat().st_size))


def whole_folder(folder: Path) -> Path:
    folder.mkdir()
    entries = {"model": {"weight": torch.arange(1000.0)}, "optimizer_0": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    shards = write_shards(folder, entries, lambda *_: True, None)
    finish_folder(folder, {"epoch": 3}, shards)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f, 0), "is empty"),
        (lambda f: cut(f, 0.3), "is cut off or damaged .* bytes"),
        (lambda f: cut(f, 0.999), "is cut off or damaged"),
        (lambda f: flip(f, 0.5), "is damaged: the checksum of its part 'archive/data/0'"),
        (lambda f: flip(f, 0), "is damaged"),
        (lambda f: flip(f, 1 - 1e-9), "is cut off or damaged"),
    ],
)
def test_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    file = tmp_path / "last.ckpt"
    write({"state_dict": {"weight": torch.arange(1000.0)}}, file)
    verify_file(file)
    damage(file)
    with pytest.raises(CheckpointError, match=f"^the checkpoint {file} {message}.*Take another checkpoint"):
        verify_file(file)


def test_every_flipped_byte_that_changes_what_is_read_is_found(tmp_path: Path) -> None:
    file, values = tmp_path / "last.ckpt", torch.arange(4.0)
    write({"weight": values}, file)
    whole, found = file.read_bytes(), 0
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            verify_file(file)
        except CheckpointError:
            found += 1
        else:
            assert torch.equal(torch.load(file)["weight"], values), place
    assert found > 0.4 * len(whole) / 7


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    for content in (b"hello", b"\x89PNG\r\n", b"{}"):
        file = tmp_path / "bad.ckpt"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"^{file} is no checkpoint"):
            verify_file(file)


def test_files_of_other_settings(tmp_path: Path) -> None:
    """Files in torch's format before 1.6, and files without checksums where torch is told to write none."""
    file = tmp_path / "last.ckpt"
    torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    verify_file(file)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, file)
        verify_file(file)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SHARD).unlink(), f"is incomplete: its file {SHARD} is missing"),
        (lambda f: (f / META).unlink(), f"is incomplete: its file {META} is missing"),
        (lambda f: (f / INDEX).unlink(), f"is incomplete: its file {INDEX} is missing"),
        (lambda f: cut(f / SHARD, 0.5), f"is damaged: its file {SHARD} has .* bytes instead of"),
        (lambda f: cut(f / META, 0), f"is damaged: its file {META} has 0 bytes instead of"),
        (lambda f: flip(f / SHARD, 0.5), f"is damaged: the checksum of {SHARD} is wrong"),
        (lambda f: flip(f / INDEX, 0.5), f"is damaged: the checksum of {INDEX} is wrong"),
        (lambda f: flip(f / META, 0.5), f"is damaged: the checksum of {META} is wrong"),
        (lambda f: cut(f / CHECKSUMS, 0.5), f"is damaged: its file {CHECKSUMS} is no JSON"),
    ],
)
def test_folders(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = whole_folder(tmp_path / "last.ckpt")
    assert torch.equal(read_folder(folder, True)["state_dict"]["weight"], torch.arange(1000.0))
    damage(folder)
    with pytest.raises(CheckpointError, match=f"^the checkpoint {folder} {message}"):
        read_folder(folder)


def test_folders_without_checksums(tmp_path: Path) -> None:
    """Those of earlier versions and of other programs are read; a shard that is missing or cut off is found."""
    folder = whole_folder(tmp_path / "last.ckpt")
    (folder / CHECKSUMS).unlink()
    assert read_folder(folder)["epoch"] == 3
    shutil.copytree(folder, tmp_path / "copy")
    cut(folder / SHARD, 0.5)
    with pytest.raises(CheckpointError, match=f"its file {SHARD} has .* bytes instead of"):
        read_folder(folder)
    (tmp_path / "copy" / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"its file {SHARD} is missing"):
        read_folder(tmp_path / "copy")


class Code:
    """Runs code where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_an_index_that_runs_code(tmp_path: Path, weights_only: bool | None) -> None:
    folder, trace = whole_folder(tmp_path / "last.ckpt"), tmp_path / "trace"
    (folder / CHECKSUMS).unlink()
    (folder / INDEX).write_bytes(pickle.dumps(Code(trace)))
    with pytest.raises(CheckpointError, match=r"its index \.metadata: it names posix\.mkdir, .* may run code"):
        read_folder(folder, weights_only)
    assert not trace.exists()


def test_values_in_shards_that_run_code(tmp_path: Path) -> None:
    folder, trace = tmp_path / "last.ckpt", tmp_path / "trace"
    folder.mkdir()
    finish_folder(folder, {}, write_shards(folder, {"model": {"x": Code(trace)}}, lambda *_: True, None))
    with pytest.raises(Exception, match="Weights only load failed"):
        read_folder(folder, True)
    assert not trace.exists()
    read_folder(folder, False)
    assert trace.exists()
