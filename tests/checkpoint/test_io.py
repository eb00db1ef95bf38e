"""Checkpoints in one file are read from the disk when their values are needed, and what stays is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_januspipe.checkpoint.atomic import write
from lightning_januspipe.checkpoint.io import atomic_checkpoint_io, copy_from_file
from lightning_januspipe.strategy.library import Library

MEGABYTE = 2**20


def _resident(file: Path) -> int:
    """Returns the bytes of a file that are in this process's memory."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):
            is_of_file = bool(others) and others[-1] == str(file)
        elif first == "Rss:" and is_of_file:
            total += 1024 * int(others[0])
    return total


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A checkpoint of 24 MB, and its file."""
    weights = [torch.full((MEGABYTE,), float(i)) for i in range(2)]
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.full((MEGABYTE,), 2.0 + i)} for i in range(2)}
    average = torch.full((MEGABYTE,), 5.0)
    checkpoint = {
        "state_dict": {"first": weights[0], "second": weights[1]},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}],
        "callbacks": {"Average": {"whole": average, "half": [average[MEGABYTE // 2 :]]}},
    }
    file = tmp_path / "last.ckpt"
    write(checkpoint, file)
    return atomic_checkpoint_io(Library("lightning")).load_checkpoint(file, weights_only=True), file


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_only_what_is_read_is_in_memory(loaded: tuple[dict[str, Any], Path]) -> None:
    checkpoint, file = loaded
    assert file.stat().st_size > 20 * MEGABYTE
    # The other entries were copied: their pages may still be there.
    before = _resident(file)
    assert before < 5 * MEGABYTE
    assert checkpoint["state_dict"]["second"].sum() == MEGABYTE
    assert 3 * MEGABYTE < _resident(file) - before < 5 * MEGABYTE
    moment = checkpoint["optimizer_states"][0]["state"][1]["exp_avg"]
    copy_from_file(checkpoint["optimizer_states"][0]["state"][1])
    assert moment[-1] == 3.0


def test_what_stays_is_not_in_the_file(loaded: tuple[dict[str, Any], Path]) -> None:
    """Whoever writes over the file in place changes nothing that was copied."""
    checkpoint, file = loaded
    average, state = checkpoint["callbacks"]["Average"], checkpoint["optimizer_states"][0]["state"]
    copy_from_file(state[0])
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert bool((average["whole"] == 5).all()) and bool((average["half"][0] == 5).all())
    assert bool((state[0]["exp_avg"] == 2).all()) and state[0]["step"] == 3
    assert bool((state[1]["exp_avg"] == 0).all()), "this one is read from the file"
    average["whole"][-1] = 6
    assert average["half"][0][-1] == 6


def test_files_in_the_format_before_zip_archives(tmp_path: Path) -> None:
    file = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(3.0)}}, file, _use_new_zipfile_serialization=False)
    found = atomic_checkpoint_io(Library("lightning")).load_checkpoint(file, weights_only=True)
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))
