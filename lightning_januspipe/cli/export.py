"""Runs ``januspipe export``, which makes of a checkpoint a file that runs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_januspipe.cli.parsers import CommandParser
from lightning_januspipe.errors import CheckpointError


def main(args: Sequence[str]) -> None:
    """Runs ``januspipe export CHECKPOINT FILE``.

    Args:
        args: The command line after ``export``.
    """
    parser = CommandParser(
        "januspipe export",
        "Compiles the potential of a checkpoint into one file, which gives energy, forces and stress for structures of "
        "any size in Python and C++ with torch alone; or writes a model of metatomic.",
    )
    parser.add_argument("checkpoint", type=Path, help="Checkpoint of a PotentialModule: a file or a folder.")
    parser.add_argument("file", type=Path, help="File to write: .pt2, or .pt for a model of metatomic.")
    parser.add_argument("--device", type=str, default="cpu", help="Device that a .pt2 file is for: cpu or cuda.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "float64"] | None, help="Type of numbers; as in the checkpoint if left out."
    )
    parser.add_argument(
        "--task", type=str | None, help="Task that the file is for, of a potential that was trained on several."
    )
    given = parser.parse_args(args)
    if not given.checkpoint.exists():
        parser.error(f"{given.checkpoint} does not exist; expected a checkpoint")
    from lightning_januspipe.deploy import export_metatomic, export_potential

    try:
        if given.file.suffix == ".pt":
            export_metatomic(given.checkpoint, given.file, dtype=given.dtype, task=given.task)
            print(f"wrote {given.file}, a model of metatomic")
            return
        metadata = export_potential(
            given.checkpoint, given.file, device=given.device, dtype=given.dtype, task=given.task
        )
    except (ValueError, ImportError, CheckpointError) as error:
        parser.error(str(error))
    print(f"wrote {given.file} for {metadata['device']} in {metadata['dtype']}, species {metadata['species']}")
