"""Reads what the documents say about files and functions of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_januspipe"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def named_functions(document: Path) -> Iterator[tuple[str, list[str], str]]:
    """Yields file, functions and description of the rows of all tables with the columns "file" and "function".

    A row without a file has the file of the row before.
    """
    file, in_table = "", False
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "file" in cells and "function" in cells:
            in_table, columns = True, (cells.index("file"), cells.index("function"))
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("|-"):
            file = cells[columns[0]].strip("`") or file
            yield file, re.findall(r"`([^`]+)`", cells[columns[1]]), cells[-1]


def defined_names(file: Path) -> set[str]:
    """Returns the functions, classes and methods of a file; methods with and without the name of their class."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{m}" for m in methods}
    return found
