"""Writes docs/tutorial.ipynb: the text and the Python of docs/tutorial.md, with what it shows when it runs.

pip install -c constraints.txt -e ".[tutorial]" && python docs/make_tutorial.py
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")


def cells() -> list[tuple[str, str]]:
    """Returns the type and the text of each cell."""
    found = []
    for index, part in enumerate(re.split(r"```python\n(.*?)```\n", PAGE.read_text(), flags=re.DOTALL)):
        if part.strip():
            found.append(("code" if index % 2 else "markdown", part.strip()))
    return found


def executed(folder: str | Path, timeout: int = 1800) -> Any:
    """Returns the notebook after it has run in a folder."""
    import nbformat
    from nbclient import NotebookClient

    new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    made = nbformat.v4.new_notebook(cells=[new[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(cells())])
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    NotebookClient(made, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    return made


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        made = executed(folder)
    for cell in made.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # has paths
    NOTEBOOK.write_text(nbformat.writes(made) + "\n")
