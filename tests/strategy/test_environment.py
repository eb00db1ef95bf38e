"""What surrounds a run and contradicts the Trainer is an error that names it, before any process is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import lightning
import pytest

from lightning_januspipe.strategy.environment import check_joined, check_script, listen
from lightning_januspipe.strategy.threads import threads_of
from lightning_januspipe.testing import reserved_port

SHELL = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sh", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0"}  # fmt: skip
TASKS = {**SHELL, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODE_RANK": "1"}, r"NODE_RANK=1, but Trainer\(devices=2, num_nodes=1\) .* `unset NODE_RANK`"),
        ({"GROUP_RANK": "3"}, "GROUP_RANK=3.*`unset GROUP_RANK`"),
        ({"NODE_RANK": "one"}, "NODE_RANK='one' is no number"),
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK=0 is set.*MASTER_PORT is not.*`unset LOCAL_RANK WORLD_SIZE`"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1, but .* 2 processes.*`unset LOCAL_RANK WORLD_SIZE`"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}, "WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2", "MASTER_PORT": "29500"}, "LOCAL_RANK=2, .* 2 processes on a machine.*`unset LOCAL_RANK`"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is no number"),
        (SHELL, r"SLURM_NTASKS=1, but .*--ntasks-per-node=2`.*`unset SLURM_NTASKS`"),
        ({**TASKS, "SLURM_PROCID": "2"}, "SLURM_PROCID=2"),
        ({k: v for k, v in TASKS.items() if k != "SLURM_NODEID"}, "SLURM_NODEID is not: srun did not start this"),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        lightning.Trainer(accelerator="cpu", devices=2, strategy="januspipe", logger=False)


@pytest.mark.parametrize("variables", [{}, {"NODE_RANK": "0"}, {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}, TASKS])
def test_variables_that_fit(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="januspipe", logger=False)
    assert trainer.strategy.mesh_shape.size == 2


def test_a_left_over_rank_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but .*devices=1"):
        lightning.Trainer(accelerator="cpu", devices=1, strategy="januspipe", logger=False)


PROGRAM = """
import lightning, lightning_januspipe
lightning.Trainer(accelerator="cpu", devices=2, strategy="januspipe", logger=False)
"""


def test_a_program_from_standard_input() -> None:
    variables = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-"], input=PROGRAM, capture_output=True, text=True, env=variables, timeout=120, check=False
    )
    assert done.returncode == 1
    *before, cause = done.stderr.splitlines()
    assert "this program is no file: it came from standard input" in cause
    traceback = before[before.index(next(line for line in before if "calls inside libraries are left out" in line)) :]
    assert len(traceback) <= 3 and "lightning.Trainer(" not in traceback, "one call of the program, which has no file"


def test_programs_that_are_no_files() -> None:
    file = SimpleNamespace(__file__=__file__, __spec__=None)
    check_script(file, [__file__])
    check_script(SimpleNamespace(__file__=__file__, __spec__="a module"), ["-m"])
    with pytest.raises(ValueError, match="standard input, `python -c`, a notebook or a prompt. Save it as a file"):
        check_script(SimpleNamespace(__spec__=None), ["-c"])
    with pytest.raises(ValueError, match=r"sys.argv\[0\]='elsewhere.py' is no file in "):
        check_script(file, ["elsewhere.py"])


def test_a_port_in_use() -> None:
    with reserved_port() as port, listen("127.0.0.1", port):
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} is in use on this machine.*`unset MASTER_PORT`"):
            listen("127.0.0.1", port)
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} is in use"):
            listen("", port)
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_trainers_of_other_sizes() -> None:
    check_joined(2, 2)
    with pytest.raises(ValueError, match="one of 2 that an earlier Trainer .* this Trainer has 4"):
        check_joined(2, 4)


def test_shares_of_cores() -> None:
    """Cores that several ranks may use are shared; a rank that is bound to its own has all of them."""
    everywhere = ("a", frozenset(range(8)))
    assert threads_of(everywhere, [everywhere]) == 8
    assert threads_of(everywhere, [everywhere] * 2 + [("b", everywhere[1])] * 6) == 4
    assert threads_of(everywhere, [everywhere] * 3) == 2
    assert threads_of(everywhere, [everywhere] * 16) == 1
    bound = [("a", frozenset(range(4 * i, 4 * i + 4))) for i in range(2)]
    assert [threads_of(mine, bound) for mine in bound] == [4, 4]
