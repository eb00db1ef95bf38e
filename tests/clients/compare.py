"""Train with a program in a process of its own, and compare what two runs trained.

A program takes ``--out FILE`` and writes there, with ``torch.save``, a dict with ``losses`` (one number per step) and
``state`` (the consolidated state dict after the last step). Command lines of packages write checkpoints, of which
:func:`summary` makes the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from lightning_januspipe.testing import PotentialConformance

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
TIMEOUT = 280.0


def client_marks(module: str, package: str = "") -> list[pytest.MarkDecorator]:
    """Returns the marks of a package's tests: slow, skipped where it is not installed, and deaf to its warnings.

    Args:
        module: the name by which it is imported.
        package: the name by which it is installed, if that is another one.
    """
    ignored = (UserWarning, DeprecationWarning, FutureWarning)
    return [
        pytest.mark.slow,
        pytest.mark.timeout(1800),
        pytest.mark.skipif(find_spec(module) is None, reason=f"{package or module} is not installed"),
        *(pytest.mark.filterwarnings(f"ignore::{warning.__name__}") for warning in ignored),
    ]


def pipeline(num_microbatches: int, devices: int = 2) -> list[str]:
    """Returns a program's arguments for a pipeline of as many ranks as devices."""
    return ["--devices", str(devices), "--janus", f'{{"num_microbatches": {num_microbatches}}}']


def train(program: str, folder: Path, name: str, *arguments: str) -> Path:
    """Runs a program and returns the file with what it trained.

    Args:
        program: file name in ``tests/clients/programs``.
        folder: where it runs and writes.
        name: of this run.
        arguments: the program's.
    """
    out = folder / f"{name}.pt"
    execute([sys.executable, str(PROGRAMS / program), "--out", str(out), *arguments], folder, name)
    return out


def execute(command: list[str], folder: Path, name: str, path: Path = ROOT, **variables: str) -> str:
    """Runs a command to its end and returns what it wrote to the terminal.

    Args:
        command: the executable and its arguments.
        folder: where it runs; what it traces is kept there for the next one.
        name: of this run.
        path: to find modules in, before others.
        variables: of its environment.

    Raises:
        AssertionError: it failed, or took too long.
    """
    search = os.pathsep.join(p for p in (str(path), os.environ.get("PYTHONPATH")) if p)
    cache = str(folder / "cache")
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "JANUSPIPE_CACHE": cache, **variables}
    log = folder / f"{name}.log"
    with log.open("w") as stream:
        # A session of its own, so that the ranks that it starts end with it.
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = f"none after {TIMEOUT:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text()
    assert code == 0, f"{' '.join(command)}: exit code {code}\n{text[-4000:]}"
    return text


def summary(checkpoint: Path) -> Path:
    """What a checkpoint of Lightning holds, in a file as programs write it; scores of ``ModelCheckpoint`` as losses."""
    saved = torch.load(checkpoint, weights_only=False)
    found = [state["best_model_score"] for state in saved["callbacks"].values() if "best_model_score" in state]
    out = checkpoint.with_suffix(".pt")
    torch.save({"losses": [float(score) for score in found], "state": saved["state_dict"]}, out)
    return out


class ClientConformance(PotentialConformance):
    """The tests that the models of every package pass, with five steps each; ``preload`` names a package's program."""

    steps, timeout = 5, 1800.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.preload = (f"{cls.__module__.rpartition('test_')[-1]}_program",)


class InductorConformance(ClientConformance):
    """Trains with phases that inductor compiles, where others interpret their graphs."""

    strategies: ClassVar = {"one-stage-compiled": {"num_microbatches": 1, "compile": True}}
    interprets, steps = False, 2


class ModelConformance(PotentialConformance):
    """The tests of models that are made by functions of ``programs/PACKAGE_models.py``, with two steps each."""

    strategies: ClassVar = {
        "two-stages": {"pipeline_size": 2, "num_microbatches": 1},
        "two-stages-4-microbatches": {"pipeline_size": 2, "num_microbatches": 4},
        "two-graph-ranks": {"graph_size": 2, "num_microbatches": 1},
        "two-stages-of-two-graph-ranks": {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 4},
        "one-stage-compiled": {"num_microbatches": 1, "compile": True},
        "two-stages-compiled": {"pipeline_size": 2, "num_microbatches": 4, "compile": True},
        "two-graph-ranks-compiled": {"graph_size": 2, "num_microbatches": 1, "compile": True},
    }
    timeout = 1800.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.preload = (f"{cls.__module__.rpartition('test_')[-1]}_models",)


TWO_STAGES = {"two-stages": {"pipeline_size": 2, "num_microbatches": 1}}
THREE_STAGES = {"three-stages": {"pipeline_size": 3, "num_microbatches": 1}}


class Runs:
    """Runs of one program in one folder, each of them once.

    Args:
        program: file name in ``tests/clients/programs``.
        folder: where they run and write.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        self._done: dict[tuple[str, ...], Path] = {}

    def __call__(self, *arguments: str) -> Path:
        """Returns the file that the program wrote with these arguments."""
        if arguments not in self._done:
            self._done[arguments] = train(self._program, self._folder, f"run{len(self._done)}", *arguments)
        return self._done[arguments]


def sent_per(log: Path) -> set[str]:
    """What a pipeline sends numbers for, ``{"atom"}`` for one, by the line that it printed when it was captured."""
    (line,) = [line for line in log.read_text().splitlines() if "januspipe: potential" in line]
    return set(re.findall(r"B per (\w+)", line))


def assert_same(reference: Path, found: Path, tolerance: float = 1e-9, losses: bool = True) -> None:
    """Two runs trained the same.

    Args:
        reference: file of the first run.
        found: file of the second.
        tolerance: largest difference within a tensor, relative to the largest number in it.
        losses: compare the losses of all steps too; where steps are of other batches, only the parameters.
    """
    first, second = (torch.load(p, weights_only=False) for p in (reference, found))
    assert first["state"].keys() == second["state"].keys()
    values = {n: (a, second["state"][n]) for n, a in first["state"].items() if isinstance(a, torch.Tensor)}
    if losses:
        values["losses"] = torch.tensor(first["losses"]), torch.tensor(second["losses"])
    assert first["losses"] and second["losses"], "nothing was trained"
    assert not any(a.shape != b.shape for a, b in values.values())
    differences = {name: _difference(a.double(), b.double()) for name, (a, b) in values.items() if a.numel()}
    worst = sorted(differences.items(), key=lambda item: -item[1])[:5]
    assert all(d <= tolerance for _, d in worst), f"largest relative differences: {worst}"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    error, scale = float((a - b).abs().max()), float(a.abs().max())
    return error if scale == 0 else error / scale if error == error else float("inf")
