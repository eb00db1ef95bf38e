"""Files and folders that are replaced at once, or not at all."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.checkpoint.integrity import verify_file

FORK = multiprocessing.get_context("fork")


def write(path: Path, kind: str, content: str) -> None:
    """A file, or a folder with two."""
    if kind == "file":
        path.write_text(content)
        return
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(content)


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else "+".join(p.read_text() for p in sorted(path.iterdir()))


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["nothing", "file", "folder", "link"])
def test_replacing(tmp_path: Path, old: str, new: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    path, other = tmp_path / "new" / "last.ckpt", tmp_path / "other"
    if old != "nothing":
        path.parent.mkdir()
    if old in ("file", "folder"):
        write(path, old, "old")
    if old == "link":
        write(other, "folder", "linked")
        path.symlink_to(other)
    with atomic.replacing(path) as part:
        assert part.parent == path.parent and (old == "nothing" or path.exists())
        write(part, new, "new")
    assert read(path) == ("new" if new == "file" else "new+new") and not path.is_symlink()
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert old != "link" or read(other) == "linked+linked"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_killed_anywhere(tmp_path: Path, kind: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of its calls to the file system, the old content is there, or the new, and never a part."""
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    real: dict[str, Callable[..., object]] = {n: getattr(os, n) for n in ("fsync", "rename", "replace", "unlink")}
    seen = set()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "last.ckpt"
        write(path, kind, "old")
        left = [number]

        def dying(name: str, left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object, **more: object) -> object:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real[name](*arguments, **more)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, dying(name))
            try:
                with atomic.replacing(path) as part:
                    write(part, kind, "new")
            except KeyboardInterrupt:
                pass
        atomic.recover(path)
        seen.add(read(path))
        others = [name for name in os.listdir(folder) if name != "last.ckpt"]
        assert all(re.fullmatch(r"\.januspipe-[0-9a-f]{12}-[0-9a-f]{12}\.(part|old)", name) for name in others)
        if left[0] > 0:
            break
    assert seen == ({"old", "new"} if kind == "file" else {"old+old", "new+new"})


def test_what_killed_processes_left_is_removed_by_age(tmp_path: Path) -> None:
    """Also what earlier versions left under names that all processes shared; what another job writes now stays."""
    path = tmp_path / "last.ckpt"
    old, shared, new, trash = (atomic.hidden(path) for _ in range(4))
    shared = shared.with_name(shared.name[: len(".januspipe-") + 12] + ".part")
    for left, kind in ((old, "folder"), (shared, "file"), (trash, "folder"), (new, "folder")):
        write(left, kind, "half")
    before = time.time() - 4000
    for left in (old, *old.iterdir(), shared, trash):  # a shard in `trash` is still being written
        os.utime(left, (before, before))
    with atomic.replacing(path) as part:
        write(part, "file", "new")
    assert read(path) == "new" and set(os.listdir(tmp_path)) == {"last.ckpt", new.name, trash.name}


def test_old_content_without_a_successor_is_kept_however_old(tmp_path: Path) -> None:
    path, other = tmp_path / "last.ckpt", tmp_path / "step=3.ckpt"
    for name in (path, other):
        write(old := atomic.hidden(name, "old"), "file", "old")
        os.utime(old, (0, 0))
    with atomic.replacing(other) as part:
        write(part, "file", "new")
    atomic.recover(path)
    assert read(path) == "old" and read(other) == "new"


def test_a_part_of_one_job_is_not_committed_by_another(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, "file", "old")
    with atomic.replacing(path) as ours:
        write(ours, "file", "ours")
        other = atomic.prepare(path)
        write(other, "file", "half")
        assert read(ours) == "ours"
    assert read(path) == "ours" and read(other) == "half"


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_jobs_that_save_under_one_name(
    tmp_path: Path, kind: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes save at once: no save fails, and what is there at last is whole."""
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    path = tmp_path / "last.ckpt"

    def save(job: int) -> None:
        for number in range(40):
            with atomic.replacing(path) as part:
                write(part, kind, f"{job}.{number} ")

    jobs = [FORK.Process(target=save, args=(job,)) for job in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert re.fullmatch(r"(\d\.39 )(\+\1)?", read(path)) and os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_instant(tmp_path: Path, kind: str) -> None:
    """SIGKILL while a process saves one after the other: what was saved last, or the one before, is there."""
    path = tmp_path / "last.ckpt"

    def save(told: Any) -> None:
        for number in itertools.count():
            with atomic.replacing(path) as part:
                if kind == "folder":
                    part.mkdir()
                atomic.write({"step": number, "x": torch.zeros(1000)}, part / "meta.pt" if kind == "folder" else part)
            told.send(number)

    for attempt in range(12):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save, args=(sender,))
        process.start()
        last = receiver.recv()
        time.sleep(0.003 * attempt)
        process.kill()
        process.join()
        sender.close()
        with suppress(EOFError):
            while True:
                last = receiver.recv()
        atomic.recover(path)
        file = path / "meta.pt" if kind == "folder" else path
        verify_file(file)
        assert torch.load(file)["step"] in (last, last + 1)


def in_child(function: Callable[[], None]) -> str:
    """Runs a function in a forked process, which may limit itself; returns its error."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        try:
            function()
            sender.send("")
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=run)
    process.start()
    assert receiver.poll(60)
    told = receiver.recv()
    process.join(60)
    return str(told)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    """What was there stays, nothing is left beside it, and the error has path and reason."""
    path, value = tmp_path / "last.ckpt", {"x": torch.zeros(100_000)}
    write(path, "file", "old")

    def too_large() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with atomic.replacing(path) as part:
            atomic.write(value, part)

    def full() -> None:
        with atomic.replacing(path) as part:
            part.symlink_to("/dev/full")
            atomic.write(value, part)

    def read_only() -> None:
        tmp_path.chmod(0o555)
        if os.getuid() == 0:
            os.setuid(65534)
        with atomic.replacing(path) as part:
            atomic.write(value, part)

    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    for function, reason in (
        (too_large, "File too large"),
        (full, "No space left on device"),
        (read_only, "Permission denied"),
    ):
        assert in_child(function) == (
            f"CheckpointError: {path} could not be saved: {reason}. What was saved before is unchanged."
        )
        tmp_path.chmod(0o755)
        assert read(path) == "old" and os.listdir(tmp_path) == ["last.ckpt"]


def test_an_error_of_the_users_objects_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), atomic.replacing(tmp_path / "last.ckpt") as part:
        atomic.write({"hook": lambda: None}, part)
    assert os.listdir(tmp_path) == []


def test_removing(tmp_path: Path) -> None:
    folder, link, file = tmp_path / "folder", tmp_path / "link", tmp_path / "file"
    write(folder, "folder", "x")
    write(file, "file", "x")
    link.symlink_to(folder)
    atomic.remove(link)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    for path in (folder, file, tmp_path / "absent"):
        atomic.remove(path)
    assert os.listdir(tmp_path) == []


def test_hidden_names_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    """Lightning finds "last" by the beginning of a name and its suffix, and SLURM's checkpoints by a part of it."""
    for name in ("last.ckpt", "last-v1.ckpt", "hpc_ckpt_3.ckpt"):
        for kind in ("part", "old", "gone"):
            hidden = atomic.hidden(tmp_path / name, kind)
            assert hidden.parent == tmp_path and hidden.suffix != ".ckpt"
            assert not hidden.stem.startswith("last") and "ckpt" not in hidden.name
