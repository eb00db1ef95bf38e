"""Defines the errors that users meet, beside the errors of libraries."""

from __future__ import annotations

WITHOUT_CAPTURE = "pipeline_size=1 and graph_size=1, without expert_size, compile, activation and memory_limit"
"""Options with which a potential is trained as it is, for the end of an error."""


class CaptureError(ValueError):
    """Says that the potential cannot be captured: what was found, what was expected and what to do."""


class TooFewParts(CaptureError):
    """Says that the potential has fewer cuttable parts than stages are asked for.

    Args:
        message: What to tell the user.
        most: The most stages that the parts are enough for.
    """

    def __init__(self, message: str, most: int = 1) -> None:
        super().__init__(message)
        self.most = most


def quoted(path: str) -> str:
    """Returns the dotted name of a potential for a message; the LightningModule itself has an empty one."""
    return repr(path) if path else "(the LightningModule itself)"


def in_one_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message that is not empty."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text}"


class PipelineError(RuntimeError):
    """Says that a rank could not go on, in which phase, stage and micro-batch."""


class RankLostError(PipelineError):
    """Says that a rank waited for another one, which did not come: which ranks, in which wait, and for how long."""


class CheckpointError(RuntimeError):
    """Says that a checkpoint could not be saved, removed or read, with its path and the reason."""
