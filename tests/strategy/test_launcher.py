"""The Trainer's own launcher: threads, the store, and what is printed when a rank fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pools import slow

from lightning_januspipe.strategy.launcher import end_of

SCRIPT = Path(__file__).parents[1] / "support" / "launched_script.py"

ADDED = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")


def launched(how: str, rank: int, folder: Path) -> tuple[int, list[str]]:
    """Runs the script, sees that no process is left, and returns its exit status and what it has printed."""
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name not in ADDED} | {"PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), how, str(rank), str(folder)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=250, check=False
    )
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
    assert not left
    return done.returncode, done.stdout.splitlines()


def test_threads_and_the_store(tmp_path: Path) -> None:
    """Every rank has its share of the cores, and nothing listens to other machines."""
    code, lines = launched("well", 0, tmp_path)
    assert code == 0, lines
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(f["threads"], f["variable"]) for f in found] == [(int(share), share)] * 2
    assert [f["listening"] for f in found] == [["0100007F"]] * 2  # 127.0.0.1


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_fault_is_the_last_that_is_said(tmp_path: Path, rank: int) -> None:
    """The other rank says one line; then come the user's line and the error, once."""
    code, lines = launched("raise", rank, tmp_path)
    assert code == 1
    assert lines[-1] == f"KeyError: 'no such thing on rank {rank}'" and sum("KeyError" in line for line in lines) == 2
    assert lines[-2].strip().startswith("raise KeyError(") and "launched_script.py" in lines[-3]
    first = lines.index(f"[rank {1 - rank}] ended because rank {rank} has failed")
    assert len(lines) - first < 12, lines


@pytest.mark.slow
def test_a_fault_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    code, lines = launched("raise", -1, tmp_path)
    assert code == 1
    assert lines[-1] == "KeyError: 'nowhere'" and lines.count(lines[-1]) == 1
    assert not any(line.startswith("[rank") for line in lines)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("kill", "was ended by signal 9, SIGKILL: out of memory?"),
        slow("exit", "ended with exit status 3; its own output has the cause."),
    ],
)
def test_a_rank_that_ends_without_a_word(tmp_path: Path, how: str, said: str) -> None:
    """The process and the signal are said last."""
    code, lines = launched(how, 1, tmp_path)
    pid = json.loads((tmp_path / "1.json").read_text())["pid"]
    assert code == 1 and lines[-1] == f"Rank 1 (process {pid}) {said}"
    assert re.match(r"\[rank 0\] global rank 0 waited .* for global rank 1, which did not come", lines[-2])


def test_ends() -> None:
    assert end_of(3, 17, 2) == "Rank 3 (process 17) ended with exit status 2; its own output has the cause."
    assert end_of(3, 17, -15) == "Rank 3 (process 17) was ended by signal 15, SIGTERM."
