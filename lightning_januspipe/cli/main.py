"""The command line: ``januspipe fit|validate|test|predict|plan --config recipes/NAME.yaml``, ``januspipe bench``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import lightning_januspipe  # noqa: F401  (registers the strategy's names)
from lightning_januspipe.cli.fit import PotentialCLI


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``januspipe``.

    Args:
        args: Command line without the name of the program; None for ``sys.argv``. A Trainer with several processes
            starts them by running ``sys.argv`` again, so that it needs None here.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["bench"]:
        from lightning_januspipe.bench.command import main as bench

        bench(given[1:])
        return
    if given[:1] == ["consolidate"]:
        from lightning_januspipe.cli.consolidate import main as consolidate

        consolidate(given[1:])
        return
    # What Lightning and its own dependencies say to each other, and no user can mend.
    warnings.filterwarnings("ignore", message=r"\s*``instantiate_classes`` was deprecated")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    warnings.filterwarnings("ignore", message="Starting from v1.9.0, `tensorboardX` has been removed")
    if given[:1] == ["plan"]:
        from lightning_januspipe.cli.plan import main as plan

        plan(given[1:])
        return
    PotentialCLI(given)
