"""The process that compiles in the background: its errors are told, and it ends with training."""

from __future__ import annotations

import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from lightning_januspipe.compiled.background import BackgroundCompile
from lightning_januspipe.runtime.change_over import CompileShare, compiling_ranks


class Source:
    """Calls a function in the process that reads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def started(tmp_path: Path, **sources: Any) -> BackgroundCompile:
    return BackgroundCompile(sources, tmp_path / "compiled", tmp_path / "inductor")


def wait_for(background: BackgroundCompile) -> None:
    end = time.monotonic() + 200
    while not background.has_ended():
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.1)


def require_none_left(background: BackgroundCompile) -> None:
    """Neither processes of its group, nor one that nobody has waited for, nor its files."""
    with pytest.raises(ProcessLookupError):
        os.killpg(background._process.pid, 0)
    assert background._process.returncode is not None
    assert not background._folder.exists()


def test_it_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    background = started(tmp_path, a=Source(time.sleep, 600))
    assert not background.has_ended()
    background.end()
    background.end()
    require_none_left(background)
    assert background.has_ended()


def test_an_error_is_told(tmp_path: Path) -> None:
    background = started(tmp_path, a=Source(int, "x"))
    wait_for(background)
    assert background.result().failed["a"].startswith("ValueError: invalid literal for int()")
    assert background.result().cpu_seconds > 0
    background.end()
    require_none_left(background)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["without a result", "with training"])
def test_it_ends(tmp_path: Path, how: str) -> None:
    """A process that crashes says so; one whose training process has ended follows it."""
    with_training = how == "with training"
    background = started(tmp_path, a=Source(time.sleep, 600) if with_training else Source(os._exit, 3))
    if with_training:
        assert background._process.stdin is not None
        background._process.stdin.close()  # as the system does for a process that has ended
    wait_for(background)
    code = -9 if with_training else 3
    assert background.result().failed == {"a": f"the process that compiled it has ended with the exit code {code}"}
    background.end()
    require_none_left(background)


def _train_until_killed(tmp_path: Path) -> None:
    background = started(tmp_path, a=Source(time.sleep, 600))
    (tmp_path / "part").write_text(str(background._process.pid))
    os.replace(tmp_path / "part", tmp_path / "pid")
    time.sleep(600)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # a system without such files
        return True
    return state != "Z"  # it has ended, and nobody has asked for its exit code


@pytest.mark.slow
def test_it_ends_with_a_training_process_that_is_killed(tmp_path: Path) -> None:
    training = get_context("spawn").Process(target=_train_until_killed, args=(tmp_path,))
    training.start()
    end = time.monotonic() + 200
    while not (tmp_path / "pid").exists():
        assert training.is_alive() and time.monotonic() < end, "it does not start"
        time.sleep(0.1)
    pid = int((tmp_path / "pid").read_text())
    assert _is_running(pid)
    training.kill()
    training.join()
    while _is_running(pid):
        assert time.monotonic() < end, "what compiles runs on"
        time.sleep(0.1)


def test_one_rank_of_each_machine_compiles_a_stage() -> None:
    shares = [
        CompileShare("one", "/cache", {"a": False}, ""),
        CompileShare("one", "/cache", {"a": False, "b": False}, ""),
        CompileShare("one", "/cache", {"c": True}, ""),
        CompileShare("two", "/cache", {"a": False}, ""),
        CompileShare("two", "/own", {"a": False}, ""),
    ]
    assert compiling_ranks(shares) == {
        ("one", "/cache", "a"): 0,
        ("one", "/cache", "b"): 1,
        ("two", "/cache", "a"): 3,
        ("two", "/own", "a"): 4,
    }
