"""MatGL's PotentialLightningModule over TensorNet, M3GNet and CHGNet, unmodified, trained in a pipeline.

Slow, and skipped where MatGL is absent:

    pip install matgl==4.1.2 && python -m pytest -m slow tests/clients/test_matgl.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from .compare import assert_same, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("matgl") is None, reason="matgl is not installed"),
]

PROGRAM = "matgl_program.py"


def pipeline(num_microbatches: int, devices: int = 2) -> list[str]:
    """Arguments for a pipeline of as many ranks as devices."""
    return ["--strategy", "januspipe", "--devices", str(devices), "--janus", f'{{"num_microbatches": {num_microbatches}}}']


@pytest.mark.parametrize("model", ["tensornet", "m3gnet", "chgnet"])
def test_whole_batches(model: str, tmp_path: Path) -> None:
    reference = train(PROGRAM, tmp_path, "plain", "--model", model)
    found = train(PROGRAM, tmp_path, "pipeline", "--model", model, *pipeline(1))
    assert_same(reference, found)


@pytest.mark.parametrize("model", ["tensornet", "m3gnet", "chgnet"])
def test_microbatches_are_accumulation(model: str, tmp_path: Path) -> None:
    common = ["--model", model, "--structures", "mixed"]
    reference = train(PROGRAM, tmp_path, "plain", *common, "--batch-size", "1", "--accumulate", "4")
    found = train(PROGRAM, tmp_path, "pipeline", *common, *pipeline(4))
    assert_same(reference, found, losses=False)  # those of single structures there, of batches here


def test_three_ranks(tmp_path: Path) -> None:
    reference = train(PROGRAM, tmp_path, "plain", "--layers", "4")
    found = train(PROGRAM, tmp_path, "pipeline", "--layers", "4", *pipeline(1, devices=3))
    assert_same(reference, found)
