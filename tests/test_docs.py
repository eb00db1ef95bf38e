"""What the documents say of tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs" / "lightning.md").read_text()
ROWS = [line for line in TABLE.splitlines() if line.startswith("|") and ".py" in line]


@pytest.mark.parametrize("row", ROWS, ids=[r.split("|")[1].strip()[:40] for r in ROWS])
def test_rows_of_the_support_matrix_name_tests_that_exist(row: str) -> None:
    """A name without a file is in the file that was named last."""
    source = ""
    for name in re.findall(r"`([^`]*)`", row.split("|")[-2]):
        file, _, test = name.rpartition("::") if "::" in name or not name.endswith(".py") else (name, "", "")
        if file:
            source = (ROOT / "tests" / file).read_text()
        assert source, f"{name}: no file is named before"
        assert not test or f"def {test}(" in source, f"{name} does not exist"


def test_rows_without_a_test_say_that_they_are_none() -> None:
    without = [line for line in TABLE.splitlines() if line.startswith("|") and ".py" not in line]
    assert all(re.search(r"\| —? ?\|?$|---|\| test \|$", line) for line in without)
