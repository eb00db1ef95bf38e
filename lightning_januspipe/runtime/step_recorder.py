"""Records single training steps when it is asked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_januspipe.engine.memory import MemoryRecorder
from lightning_januspipe.engine.timeline import ActionRecorder, Span
from lightning_januspipe.schedule import Report, Schedule


@dataclass(frozen=True)
class RankStep:
    """Holds a training step as one rank saw it.

    Attributes:
        schedule: The actions of all ranks; None without stages. A micro-batch is one action then, FE.
        spans: The actions of this rank. Time is zero when the ranks of the pipeline have compared their batches, which
            waits for all of them, so that their clocks agree to a fraction of a millisecond.
        bytes_sent: Bytes of messages to other stages.
    """

    schedule: Schedule | None
    spans: tuple[Span, ...]
    bytes_sent: int


@dataclass(frozen=True)
class RecordedStep:
    """Holds a training step as it ran, and as it was predicted.

    Attributes:
        schedule: The actions of all ranks.
        predicted: The simulation with the costs that were known when the step began, in seconds.
        recorded: The real step, in seconds.
    """

    schedule: Schedule
    predicted: Report
    recorded: Report


class StepRecorder:
    """Records the steps of one rank that it is asked to record; nothing is sent to other ranks.

    Args:
        device: The device that the stages run on.
        gradients: Returns the gradients of parameters that this rank keeps.

    Attributes:
        rank_step: The last step whose times were asked for.
        held: The most bytes that the micro-batches of this rank held at once, in the last step whose memory was asked
            for.
        wants_times: Whether the times of the next step are asked for.
        wants_memory: Whether the memory of the next step is asked for.
    """

    def __init__(self, device: torch.device, gradients: Callable[[], list[Tensor]]) -> None:
        self.rank_step: RankStep | None = None
        self.held: int | None = None
        self._recorder = ActionRecorder(device)
        self._gradients = gradients
        self.wants_times = self.wants_memory = False

    def ask(self, memory: bool = False) -> None:
        """Asks for a recording of the next step: of its times, or of its memory on the CPU, which makes it slower.

        Memory is not measured in a step whose times are needed too.
        """
        if memory:
            self.wants_memory = True
        else:
            self.wants_times = True

    @contextmanager
    def step(
        self, schedule: Schedule | None = None, bytes_sent: Callable[[], int] = int, always: bool = False
    ) -> Iterator[ActionRecorder | None]:
        """Yields the recorder that takes in the actions of one step, if the step is to be recorded.

        Args:
            schedule: Schedule of the step.
            bytes_sent: Returns the bytes of all messages so far.
            always: Whether the times of this step are needed for something else.
        """
        times, memory = self.wants_times, self.wants_memory
        self.wants_times = self.wants_memory = False
        if memory and not times and not always:
            with MemoryRecorder(self._gradients) as held:
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
