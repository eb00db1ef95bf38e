"""The errors that users meet, beside those of the libraries."""

from __future__ import annotations


class CaptureError(ValueError):
    """The potential cannot be captured; the message says what was found, what was expected and what to do."""


class TooFewParts(CaptureError):
    """The potential has fewer cuttable parts than stages are asked for.

    Args:
        message: what to tell the user.
        most: for how many stages there are parts.
    """

    def __init__(self, message: str, most: int = 1) -> None:
        super().__init__(message)
        self.most = most


def shown(path: str) -> str:
    """The dotted name of a potential in a message; empty is that of the LightningModule itself."""
    return repr(path) if path else "(the LightningModule itself)"


class PipelineError(RuntimeError):
    """A rank could not go on; the message names phase, stage and micro-batch."""
