"""What the documents say of tests, files and functions is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, PACKAGE, ROOT, defined_names, named_functions

TABLE = (ROOT / "docs" / "lightning.md").read_text()
OF_OTHERS = {"data/loader.py"}  # a file of SchNetPack
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(d.relative_to(ROOT)) for d in DOCUMENTS])
def test_files_and_functions_that_the_documents_name_exist(document: Path) -> None:
    """A path is from the root of the repository, or from that of the package."""
    files = set(re.findall(r"`((?:\w+/)+\w+\.py)`", document.read_text())) - OF_OTHERS
    missing = {f for f in files if not any((folder / f).exists() for folder in (ROOT, PACKAGE, ROOT / "tests"))}
    assert not missing, f"{document.name} names files that do not exist: {sorted(missing)}"
    for file, functions, _ in named_functions(document):
        assert functions, f"{document.name}: {file} is named without a function"
        unknown = set(functions) - defined_names(PACKAGE / file)
        assert not unknown, f"{document.name}: {file} has no {sorted(unknown)}"


def test_a_function_that_does_not_exist_is_found(tmp_path: Path) -> None:
    table = "| file | function | what happens |\n|---|---|---|\n| `mesh.py` | `MeshShape.size` | |\n| | `nothing` | |\n"
    (tmp_path / "page.md").write_text(table)
    rows = named_functions(tmp_path / "page.md")
    assert [set(functions) <= defined_names(PACKAGE / file) for file, functions, _ in rows] == [True, False]
