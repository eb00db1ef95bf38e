"""Single training steps of one rank, recorded when that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.memory import MemoryRecorder
from lightning_januspipe.engine.timeline import ActionRecorder, Span
from lightning_januspipe.schedule import Report, Schedule


@dataclass(frozen=True)
class RankStep:
    """A training step as one rank saw it.

    Attributes:
        schedule: the actions of all ranks; None where the module is undivided. A micro-batch is one action then, FE.
        spans: the actions of this rank. The time is zero when the ranks of the pipeline have compared their batches,
            which waits for all of them: so their clocks agree to a fraction of a millisecond.
        bytes_sent: in messages to other stages.
    """

    schedule: Schedule | None
    spans: tuple[Span, ...]
    bytes_sent: int


@dataclass(frozen=True)
class RecordedStep:
    """A training step as it ran, and as it was predicted.

    Attributes:
        schedule: the actions of all ranks.
        predicted: the simulation with the costs that were known when the step began, in seconds.
        recorded: the real step, in seconds.
    """

    schedule: Schedule
    predicted: Report
    recorded: Report


class StepRecorder:
    """Records the steps of one rank that it is asked to; nothing is sent to other ranks.

    Args:
        device: where the stages run.
        gradients: of this rank's parameters.

    Attributes:
        rank_step: the last step that was asked for.
        held: the most bytes that the micro-batches of this rank held at once, in the last step in which this was asked.
    """

    def __init__(self, device: torch.device, gradients: GradientBuffers) -> None:
        self.rank_step: RankStep | None = None
        self.held: int | None = None
        self._recorder = ActionRecorder(device)
        self._gradients = gradients
        self.wants_times = self.wants_memory = False

    def ask(self, memory: bool = False) -> None:
        """Record the next step: times, or memory on the CPU, which makes a step slower.

        Memory is not measured in a step of which times are needed too.
        """
        if memory:
            self.wants_memory = True
        else:
            self.wants_times = True

    @contextmanager
    def step(
        self, schedule: Schedule | None = None, bytes_sent: Callable[[], int] = int, always: bool = False
    ) -> Iterator[ActionRecorder | None]:
        """For the duration of one step: the recorder that takes in its actions, if it is to be recorded.

        Args:
            schedule: of the step.
            bytes_sent: of all messages so far.
            always: whether the times of this step are needed for something else.
        """
        times, memory = self.wants_times, self.wants_memory
        self.wants_times = self.wants_memory = False
        if memory and not times and not always:
            with MemoryRecorder(self._gradients.sums) as held:
                yield held
            self.held = held.peak
        elif times or always:
            before = bytes_sent()
            self._recorder.reset()
            yield self._recorder
            if times:
                self.rank_step = RankStep(schedule, tuple(self._recorder.spans()), bytes_sent() - before)
        else:
            yield None
