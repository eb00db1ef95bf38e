"""Files and folders that are replaced at once, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_januspipe.checkpoint import atomic


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
        assert all(re.fullmatch(r"\.januspipe-[0-9a-f]{12}\.(part|old)", name) for name in others)
        if left[0] > 0:
            break
    assert seen == ({"old", "new"} if kind == "file" else {"old+old", "new+new"})


def test_what_is_left_of_an_earlier_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(atomic.hidden(path), "folder", "half")
    with atomic.replacing(path) as part:
        write(part, "file", "new")
    assert read(path) == "new" and os.listdir(tmp_path) == ["last.ckpt"]


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
