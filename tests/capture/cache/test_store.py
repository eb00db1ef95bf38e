"""Programs come back from the disk as they were; whatever is wrong there costs a warning and nothing else."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_workers import KEY, small_program, write_and_read
from capture_models import DTYPE, Batch, Potential, Step, Traced, assert_parity, make_batch, staged_gradients
from torch import Tensor

from lightning_januspipe.capture.cache import store as cache_module
from lightning_januspipe.capture.cache.store import VARIABLE, ProgramCache
from lightning_januspipe.testing import RankPool

OTHER_KEY = "f" * 64


@pytest.fixture
def cache(tmp_path: Path) -> ProgramCache:
    """An own cache, whose folder is not made yet."""
    return ProgramCache(tmp_path / "a" / "programs")


def file_of(cache: ProgramCache, key: str = KEY) -> Path:
    assert cache.folder is not None
    return cache.folder / f"{key}.program"


def write(cache: ProgramCache, payload: bytes, key: str = KEY) -> Path:
    """A file with the right checksum and any payload."""
    path = file_of(cache, key)
    path.write_bytes(b"januspipe program 1\n" + hashlib.sha256(key.encode() + payload).digest() + payload)
    return path


class WithConstant(Potential):
    """Makes a tensor in its forward, which becomes a constant of the program."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return super().pool(values + torch.tensor([0.3, 0.2, 0.1], dtype=DTYPE)[batch["species"]], batch)


def test_a_stored_program_trains_like_the_traced_one(cache: ProgramCache) -> None:
    traced = Traced(Step(WithConstant(2)))
    assert traced.program.constants
    batch = make_batch((3, 1, 2))
    loss, expected = staged_gradients(traced.cut(2), traced.module, batch)
    assert cache.load(KEY) is None
    cache.save(KEY, traced.program)
    loaded = cache.load(KEY)
    assert loaded is not None and loaded is not traced.program
    assert all(c.device.type == "cpu" for c in loaded.constants.values())
    traced.program = loaded
    again, found = staged_gradients(traced.cut(2), traced.module, batch)
    assert torch.equal(again, loss)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    assert_parity(traced.cut(2), traced.module, make_batch((4, 2)))


def test_the_folder_is_the_users_alone(cache: ProgramCache) -> None:
    cache.save(KEY, small_program())
    assert cache.folder is not None
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert file_of(cache).stat().st_mode & 0o777 == 0o600
    assert [p.name for p in cache.folder.iterdir()] == [f"{KEY}.program"]


def test_entries_are_apart_and_replaced(cache: ProgramCache) -> None:
    cache.save(KEY, small_program(1.0))
    cache.save(OTHER_KEY, small_program(2.0))
    cache.save(KEY, small_program(3.0))
    values = [program.constants["c"][0].item() for k in (KEY, OTHER_KEY) if (program := cache.load(k)) is not None]
    assert values == [3.0, 2.0]
    cache.discard(KEY)
    assert cache.load(KEY) is None and cache.load(OTHER_KEY) is not None


def test_switched_off() -> None:
    cache = ProgramCache(None)
    cache.save(KEY, small_program())
    cache.discard(KEY)
    assert cache.load(KEY) is None


@pytest.mark.parametrize(
    ("given", "caches", "expected"),
    [
        ("/somewhere/else", None, "/somewhere/else"),
        ("~/mine", None, "~/mine"),
        ("0", None, None),
        ("OFF", None, None),
        ("", None, None),
        (None, "/caches", "/caches/lightning_januspipe/programs"),
        (None, None, "~/.cache/lightning_januspipe/programs"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, given: str | None, caches: str | None, expected: str | None
) -> None:
    for name, value in ((VARIABLE, given), ("XDG_CACHE_HOME", caches)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert ProgramCache.default().folder == (None if expected is None else Path(expected).expanduser())


DAMAGES: dict[str, Callable[[ProgramCache, bytes], Any]] = {
    "truncated": lambda cache, content: file_of(cache).write_bytes(content[:-100]),
    "empty": lambda cache, content: file_of(cache).write_bytes(b""),
    "one byte": lambda cache, content: file_of(cache).write_bytes(content[:200] + b"?" + content[201:]),
    "of another key": lambda cache, content: file_of(cache, OTHER_KEY).rename(file_of(cache)),
    "of another format": lambda cache, content: file_of(cache).write_bytes(content.replace(b"program 1", b"program 0")),
    "something else": lambda cache, content: write(cache, pickle.dumps({"a": 1})),
    "of a class that is gone": lambda cache, content: write(cache, b"cabsent_module\nName\n."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_removed(cache: ProgramCache, damage: str) -> None:
    for key in (KEY, OTHER_KEY):
        cache.save(key, small_program())
    DAMAGES[damage](cache, file_of(cache).read_bytes())
    with pytest.warns(UserWarning, match="is damaged .* and removed; the potential is traced again"):
        assert cache.load(KEY) is None
    assert not file_of(cache).exists()
    cache.save(KEY, small_program())
    assert cache.load(KEY) is not None


class Marker:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_of_others_is_not_run(cache: ProgramCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.save(KEY, small_program())
    assert cache.folder is not None
    marker, uid = tmp_path / "marker", os.getuid()
    path = write(cache, pickle.dumps(Marker(marker)))
    path.chmod(0o602)
    with pytest.warns(UserWarning, match="is not read: other users may write to it"):
        assert cache.load(KEY) is None
    path.chmod(0o600)
    cache.folder.chmod(0o720)
    with pytest.warns(UserWarning, match="is not used: other users may write to it .*JANUSPIPE_CACHE"):
        assert cache.load(KEY) is None
    with pytest.warns(UserWarning, match="is not used"):
        cache.save(OTHER_KEY, small_program())
    assert not file_of(cache, OTHER_KEY).exists()
    cache.folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: uid + 1)
        with pytest.warns(UserWarning, match=f"belongs to the user {uid}, not to {uid + 1}"):
            assert cache.load(KEY) is None
    link = file_of(cache, OTHER_KEY)
    link.symlink_to(path)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cache.load(OTHER_KEY) is None
    assert path.exists() and not marker.exists()
    with pytest.warns(UserWarning, match="damaged"):  # it is no program, but by now it was read
        assert cache.load(KEY) is None
    assert marker.exists()


@pytest.mark.parametrize(("function", "code"), [("mkstemp", errno.EROFS), ("replace", errno.ENOSPC)])
def test_failures_to_write_are_warnings(
    cache: ProgramCache, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    cache.save(OTHER_KEY, small_program())
    monkeypatch.setattr(cache_module.tempfile if function == "mkstemp" else os, function, fail)
    with pytest.warns(UserWarning, match=f"cannot be stored in .*{os.strerror(code)}.*every start traces it again"):
        cache.save(KEY, small_program())
    assert cache.folder is not None
    assert [p.name for p in cache.folder.iterdir()] == [f"{OTHER_KEY}.program"]
    assert cache.load(OTHER_KEY) is not None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ProgramCache(tmp_path / "file" / "programs")
    with pytest.warns(UserWarning, match="cannot be stored in"):
        cache.save(KEY, small_program())
    with pytest.warns(UserWarning, match="is not used"):
        assert cache.load(KEY) is None


def test_a_program_that_cannot_be_pickled(cache: ProgramCache) -> None:
    with pytest.warns(UserWarning, match="a traced potential cannot be stored .*lambda"):
        cache.save(KEY, small_program(returned=lambda: None))
    assert cache.load(KEY) is None


def test_the_oldest_are_removed(cache: ProgramCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_ENTRIES", 3)
    keys, now = [c * 64 for c in "abcd"], time.time()
    for age, key in enumerate(keys[:3]):
        cache.save(key, small_program())
        os.utime(file_of(cache, key), (0, now - 1000 + age))
    assert cache.folder is not None
    left, writing, foreign = (cache.folder / n for n in (".left.tmp", ".writing.tmp", "notes.txt"))
    for path in (left, writing, foreign):
        path.touch()
        os.utime(path, (0, now - 10 * 24 * 3600 * (path is not writing)))
    assert cache.load(keys[0]) is not None  # the oldest, but used now
    cache.save(keys[3], small_program())
    assert [k for k in keys if file_of(cache, k).exists()] == [keys[0], keys[2], keys[3]]
    assert not left.exists() and writing.exists() and foreign.exists()


def test_two_processes_write_at_once(pool: RankPool, tmp_path: Path) -> None:
    results = pool.run(write_and_read, str(tmp_path / "programs"), 100, world_size=2)
    assert {folder for folder, _ in results} == {os.environ[VARIABLE]}
    assert set().union(*(values for _, values in results)) == {0.0, 1.0}
    assert sorted(p.name for p in (tmp_path / "programs").iterdir()) == [f"{'0' * 64}.program", f"{'1' * 64}.program"]
