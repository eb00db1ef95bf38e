"""``januspipe consolidate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_januspipe.checkpoint.sharded import META, consolidate, is_folder


def main(args: Sequence[str] | None = None) -> None:
    """``januspipe consolidate FOLDER [FILE]``.

    Args:
        args: the command line without the names of program and subcommand.
    """
    parser = argparse.ArgumentParser(
        "januspipe consolidate",
        description="Make one file, which plain Lightning loads, of a checkpoint folder. Folders hold pickles: use "
        "those only that you trust.",
    )
    parser.add_argument("folder", type=Path, help="checkpoint saved with save_distributed_checkpoint=True")
    parser.add_argument("file", type=Path, nargs="?", help="default: FOLDER.consolidated")
    given = parser.parse_args(args)
    file = given.file or given.folder.with_name(given.folder.name + ".consolidated")
    if not is_folder(given.folder):
        parser.error(f"{given.folder} is no checkpoint folder: it has no {META} and no .metadata")
    if file.exists():
        parser.error(f"{file} exists")
    consolidate(given.folder, file)
    print(f"wrote {file}")
