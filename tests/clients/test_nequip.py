"""NequIP's own LightningModule and data module, unmodified, trained in a pipeline of two ranks.

Slow, and skipped where NequIP or the client script beside the repository is absent:

    pip install nequip==0.19.1 && python -m pytest -m slow tests/clients
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT.parent / "shared" / "clients" / "nequip_client.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("nequip") is None, reason="nequip is not installed"),
    pytest.mark.skipif(not CLIENT.exists(), reason="the client script is not beside the repository"),
]


def train(folder: Path, name: str, *arguments: str) -> Path:
    """Run the client; returns the file with its losses and the sums of its trained parameters."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(CLIENT), "--steps", "5", "--out", str(out), *arguments]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def differences(a: Path, b: Path) -> tuple[float, float]:
    """Largest relative difference of the losses of all steps, and of the sums over all parameters."""
    first, second = json.loads(a.read_text()), json.loads(b.read_text())

    def relative(x: float, y: float) -> float:
        return abs(x - y) / max(abs(x), abs(y), 1e-300)

    losses = [relative(x, y) for x, y in zip(first["losses"], second["losses"], strict=False)]
    parameters = [relative(first["params"][k], second["params"][k]) for k in ("n", "sum", "l2")]
    return max(losses), max(parameters)


PIPELINE = ["--import", "lightning_januspipe", "--strategy", "januspipe", "--devices", "2"]


def test_whole_batches(tmp_path: Path) -> None:
    reference = train(tmp_path, "plain", "--strategy", "auto")
    found = train(tmp_path, "pipeline", *PIPELINE, "--janus", '{"num_microbatches": 1}')
    losses, parameters = differences(reference, found)
    assert losses < 1e-9 and parameters < 1e-9


def test_microbatches_are_accumulation(tmp_path: Path) -> None:
    reference = train(tmp_path, "plain", "--strategy", "auto", "--batch-size", "1", "--accumulate", "4")
    found = train(tmp_path, "pipeline", *PIPELINE, "--batch-size", "4", "--janus", '{"num_microbatches": 4}')
    _, parameters = differences(reference, found)  # losses are of single structures there, and of batches here
    assert parameters < 1e-9
