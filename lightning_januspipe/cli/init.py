"""Runs ``januspipe init``, which writes the recipes of the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import lightning_januspipe
from lightning_januspipe.cli.parsers import CommandParser


def main(args: Sequence[str]) -> None:
    """Runs ``januspipe init [FOLDER]``.

    Args:
        args: The command line after ``init``.
    """
    parser = CommandParser(
        "januspipe init", "Writes the recipes of the package into a folder. Files that are there already are kept."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("recipes"), help="Folder to write to.")
    folder = parser.parse_args(args).folder
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in sorted(packaged_recipes().iterdir()):
        if recipe.suffix not in (".yaml", ".py"):
            continue
        target = folder / recipe.name
        if target.exists():
            print(f"kept  {target}, which is there already")
        else:
            shutil.copyfile(recipe, target)
            print(f"wrote {target}")
    print(f"\nTo begin with: januspipe fit --config {folder / 'quickstart.yaml'}")


def packaged_recipes() -> Path:
    """Returns the folder of the recipes: in the installed package, or beside it in the repository."""
    package = Path(lightning_januspipe.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
