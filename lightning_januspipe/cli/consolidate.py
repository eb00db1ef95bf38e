"""Runs ``januspipe consolidate``, which makes one file of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_januspipe.checkpoint.sharded import META, consolidate, is_folder
from lightning_januspipe.cli.parsers import CommandParser


def main(args: Sequence[str]) -> None:
    """Runs ``januspipe consolidate FOLDER [FILE]``.

    Args:
        args: The command line after ``consolidate``.
    """
    parser = CommandParser(
        "januspipe consolidate",
        "Makes one file, which plain Lightning loads, of a checkpoint folder. Folders can hold pickles: use only "
        "folders that you trust.",
    )
    parser.add_argument("folder", type=Path, help="Checkpoint that was saved with save_distributed_checkpoint=True.")
    parser.add_argument("file", type=Path, nargs="?", help="File to write; FOLDER.consolidated if it is left out.")
    given = parser.parse_args(args)
    if not is_folder(given.folder):
        parser.error(f"{given.folder} is no checkpoint folder: it has no {META} and no .metadata")
    file = given.file or Path(f"{given.folder.resolve()}.consolidated")
    if file.exists():
        parser.error(f"{file} exists; give another FILE, or remove it")
    consolidate(given.folder, file)
    print(f"wrote {file}")
