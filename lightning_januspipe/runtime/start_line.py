"""Tells, in the line that the start of a run prints, how the potential is cut and how the ranks work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_januspipe.capture import Capture
from lightning_januspipe.mesh import MeshShape

if TYPE_CHECKING:
    from lightning_januspipe.compiled.compiler import CompileReport


@dataclass(frozen=True)
class StartLine:
    """Holds what to tell about a new capture; nothing where an earlier one serves again.

    Attributes:
        line: How the potential is cut, and how the ranks work.
        details: How it was captured.
    """

    line: str = ""
    details: str = ""

    @classmethod
    def of(cls, capture: Capture, num_ranks: int, more: Sequence[str]) -> StartLine:
        """Returns what to tell about a capture.

        Args:
            capture: What was captured.
            num_ranks: Ranks of the pipeline.
            more: Words about how the ranks work.
        """
        line = "; ".join([capture.describe(num_ranks), *more])
        return cls(f"januspipe: {line}", f"januspipe: {capture.describe_capture()}")


def describe_run(schedule: str, num_microbatches: int, shape: MeshShape, expert_size: int = 1) -> str:
    """Returns in words how the ranks will work.

    Args:
        schedule: Name of the schedule.
        num_microbatches: Micro-batches of most steps.
        shape: Sizes of the mesh.
        expert_size: Number of ranks that share the experts of a stage.
    """
    words = [schedule if shape.pipeline > 1 else "no pipeline"]
    words.append(f"{num_microbatches} micro-batches" if num_microbatches > 1 else "one micro-batch")
    if shape.graph > 1:
        words.append(f"the atoms of each on {shape.graph} ranks")
    if shape.data > 1:
        words.append(f"{shape.data} replicas")
    if expert_size > 1:
        words.append(f"experts on {expert_size} ranks")
    return ", ".join(words)


def describe_compiled(of_ranks: Sequence[CompileReport]) -> str:
    """Returns in words what the ranks of a pipeline have compiled.

    Args:
        of_ranks: The report of each rank.
    """
    compiled = sum(report.num_compiled for report in of_ranks)
    words = [line for report in of_ranks for line in report.eager]
    if compiled:
        seconds = max(report.seconds for report in of_ranks)
        words.insert(0, f"phases of {compiled} {'stage' if compiled == 1 else 'stages'} compiled in {seconds:.1f} s")
    return "; ".join(words)
