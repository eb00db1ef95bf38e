"""The notebook of the tutorial has the text and the Python of its page, runs, and is small."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = spec_from_file_location("make_tutorial", DOCS / "make_tutorial.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebook_is_the_page(maker: Any) -> None:
    text = (DOCS / "tutorial.ipynb").read_text()
    kept = json.loads(text)["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept] == maker.cells()
    assert len(text) < 200_000
    outputs = [output for cell in kept for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_notebook_runs(maker: Any, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    made = maker.executed(tmp_path, timeout=1700)
    texts = "".join(o.get("text", "") for cell in made.cells for o in cell.get("outputs", []))
    drift = float(texts.rpartition("drift of the total energy: ")[2].split()[0])
    assert drift < 1.0
    assert (tmp_path / "run" / "parity-forces.png").is_file()
