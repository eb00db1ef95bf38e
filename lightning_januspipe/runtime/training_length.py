"""Tells whether a training is long enough to pay for compiling its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_PER_OPERATION = 1.0
"""Declared CPU time of compiling an operation of a stage's forward, with its part of all four phases."""

OPERATIONS_PER_PART = 100
"""Declared number of operations of a part that a model declares itself: a layer has about as many."""

LEAST_RATIO = 10.0
"""How many times as long as compiling a training has to be. It is declared, and cautious: what compiled phases save
depends on the model, and compiling takes time of the cores that training uses."""


@dataclass(frozen=True)
class TrainingLength:
    """Says how long training is going to be.

    Attributes:
        num_batches: Batches of training that are left; infinite where nothing limits them.
        seconds: Seconds that are left; infinite where nothing limits them.
    """

    num_batches: float = math.inf
    seconds: float = math.inf

    def at(self, step_time: float) -> float:
        """Returns the seconds of training.

        Args:
            step_time: Seconds of a step.
        """
        return min(self.num_batches * step_time, self.seconds)


def reason_not_to_compile(length: TrainingLength, step_time: float, num_operations: Sequence[int]) -> str:
    """Returns in words why compiling would not pay; nothing where it does.

    Args:
        length: How long training is going to be.
        step_time: Predicted seconds of an eager step.
        num_operations: The number of operations of each stage.
    """
    training, compiling = length.at(step_time), SECONDS_PER_OPERATION * sum(num_operations)
    if training >= LEAST_RATIO * compiling:
        return ""
    return (
        f"training is planned for about {max(training, 1.0):.0f} s, and to compile takes about "
        f"{max(compiling, 1.0):.0f} s of CPU time"
    )
