"""Keeps quiet what Lightning says without knowing the strategy, and its tips for other products."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from typing import Any

WARNINGS = (
    # The strategy brings the loader to where it was.
    r"You're resuming from a checkpoint that ended before the epoch ended and your dataloader is\s+not resumable",
    # What Lightning and its own dependencies say to each other, and no user can mend.
    r".*LeafSpec.*is deprecated",
    r"\s*``instantiate_classes`` was deprecated",
    r"The dirpath has changed",
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",
)
"""How the warnings begin that are left out."""

NO_LAST = (r"\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint available",)
"""How the hint begins that means nothing to a run that saves its last step, or asks for no last checkpoint."""

NOT_EMPTY = (r"Checkpoint directory .* exists and is not empty",)
"""How the warning begins that means nothing to a run that goes on from a checkpoint."""

UNREDUCED = r"It is recommended to use `self\.log\(.*sync_dist=True\)` when logging on epoch level"
"""How the warning begins about values that each rank logs for itself."""

_CONNECTOR = "trainer.connectors.checkpoint_connector"

_LINES = re.compile("💡 Tip: |`weights_only` was not set")


def quieten(lib: Any) -> None:
    """Leaves these warnings and lines out from now on, whatever strategy runs next in this process.

    Args:
        lib: The modules of one Lightning.
    """
    ignore_warnings()
    package = lib.strategies.__name__.rpartition(".")[0]
    for logger in (lib.rank_zero.rank_zero_module.log, logging.getLogger(f"{package}.{_CONNECTOR}")):
        logger.addFilter(_is_wanted)  # the same function is added once


def ignore_warnings(messages: Sequence[str] = WARNINGS) -> None:
    """Leaves these warnings out.

    Args:
        messages: How they begin, as regular expressions.
    """
    for message in messages:
        warnings.filterwarnings("ignore", message=message)


def ignore_unreduced(is_ignored: bool) -> None:
    """Leaves out Lightning's warning about values that are logged without ``sync_dist``, or lets it through again.

    Args:
        is_ignored: Whether to leave it out, as where the ranks of one pipeline log the same values. Replicas log values
            of their own.
    """
    filters: Any = warnings.filters
    warnings.filterwarnings("ignore", message=UNREDUCED)
    if not is_ignored:
        del filters[0]  # what was just added, and was taken away from where it stood before


def _is_wanted(record: logging.LogRecord) -> bool:
    return _LINES.match(record.getMessage()) is None
