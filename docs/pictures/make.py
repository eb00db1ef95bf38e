"""Makes the pictures of docs/schedules.md again: ``python docs/pictures/make.py [FOLDER]``.

The commands are those that stand below the pictures.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from lightning_januspipe.cli.main import main

COSTS = ["--costs", "7.8,10.5,14.6,5.4,6.3,7.0", "--memory", "30MB,36MB,18MB", "--format", "png"]
WAVES = ["--ranks", "4", "--num_microbatches", "8", "--schedules", "wavek,wavek-zb"]
PICTURES = {
    "one": ["--ranks", "4", "--num_microbatches", "1", "--schedules", "1f1b-2nd,wavek"],
    "all": ["--ranks", "4", "--num_microbatches", "8"],
    **{f"wave-{size}": [*WAVES, "--wave_size", str(size)] for size in (2, 4, 8)},
    "deferral": ["--ranks", "8", "--num_microbatches", "16", "--schedules", "wavek,wavek-zb"],
}
WITH_MEMORY = {"all"}


def make(folder: Path) -> None:
    """Writes all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in PICTURES.items():
        with tempfile.TemporaryDirectory() as plan:
            main(["plan", *COSTS, *options, "--output", plan])
            shutil.copyfile(f"{plan}/gantt.png", folder / f"{name}.png")
            if name in WITH_MEMORY:
                shutil.copyfile(f"{plan}/memory.png", folder / f"{name}-memory.png")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
