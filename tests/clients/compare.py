"""Train with a program in a process of its own, and compare what two runs trained.

A program takes ``--out FILE`` and writes there, with ``torch.save``, a dict with ``losses`` (one number per step) and
``state`` (the consolidated state dict after the last step).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
TIMEOUT = 280.0


def train(program: str, folder: Path, name: str, *arguments: str) -> Path:
    """Run a program and return the file with what it trained.

    Args:
        program: file name in ``tests/clients/programs``.
        folder: where it runs and writes.
        name: of this run.
        arguments: the program's.
    """
    out = folder / f"{name}.pt"
    command = [sys.executable, str(PROGRAMS / program), "--out", str(out), *arguments]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "JANUSPIPE_CACHE": str(folder / "cache")}
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
    assert code == 0, f"{program} {' '.join(arguments)}: exit code {code}\n{log.read_text()[-4000:]}"
    return out


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
