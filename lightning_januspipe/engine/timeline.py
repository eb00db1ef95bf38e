"""Measures the times of the actions of a step, on the CPU or on a CUDA stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lightning_januspipe.engine.stage_state import Collective
from lightning_januspipe.schedule import Action, Phase, Report, Schedule
from lightning_januspipe.schedule.step_report import peak_live

Mark: TypeAlias = "float | torch.cuda.Event"
"""A time: that of ``time.perf_counter()``, or an event of a CUDA stream."""


@dataclass(frozen=True)
class Span:
    """Holds when an action ran.

    Attributes:
        action: What ran.
        start: Seconds since the start of the step.
        end: Seconds since the start of the step.
    """

    action: Action
    start: float
    end: float


class _Follower:
    """Waits for collectives in a thread of its own, and notes when they have ended."""

    def __init__(self, action: Action, began: Mark, collectives: Sequence[Collective]) -> None:
        self._action, self._began, self._collectives = action, began, collectives
        self._ended = 0.0
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        with suppress(RuntimeError):  # the rank's own wait raises it too
            for collective in self._collectives:
                collective.wait()
        self._ended = time.perf_counter()

    def marks(self) -> tuple[Action, Mark, Mark]:
        """Returns the action with its start and end, when it has ended."""
        self._thread.join()
        return self._action, self._began, self._ended


class ActionRecorder:
    """Measures the times of one rank's actions; waiting for messages does not count.

    On CUDA devices the times of the current stream are measured, and nothing is synchronized before :meth:`spans`.

    Args:
        device: The device that the stages run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began: float = 0.0
        self._origin: torch.cuda.Event | None = None
        self._marks: list[tuple[Action, Mark, Mark]] = []
        self._followed: list[_Follower] = []
        self._open: Mark | None = None
        self.reset()

    def reset(self) -> None:
        """Starts a step: forgets all actions and sets the time to zero."""
        self._marks.clear()
        self._followed.clear()
        self._began = time.perf_counter()
        if self._is_cuda:
            self._origin = self.mark()  # type: ignore[assignment]

    def start(self, action: Action) -> None:
        """Notes that an action starts to compute."""
        self._open = self.mark()

    def end(self, action: Action) -> None:
        """Notes that the action that started last has ended."""
        assert self._open is not None
        self._marks.append((action, self._open, self.mark()))
        self._open = None

    def follow(self, action: Action, began: Mark, collectives: Sequence[Collective]) -> None:
        """Notes an action that runs beside others, until its collectives have ended.

        Args:
            action: The action.
            began: When it began; see :meth:`mark`.
            collectives: What it has started.
        """
        if not collectives:
            self._marks.append((action, began, self.mark()))
        elif self._is_cuda:
            with torch.cuda.stream(torch.cuda.Stream()):  # this stream waits, and not the one that computes
                for collective in collectives:
                    collective.wait()
                self._marks.append((action, began, self.mark()))
        else:
            self._followed.append(_Follower(action, began, collectives))

    def spans(self) -> list[Span]:
        """Returns all actions since :meth:`reset`; waits for the device, and for what was followed."""
        if self._is_cuda:
            torch.cuda.synchronize()
        self._marks += [follower.marks() for follower in self._followed]
        self._followed.clear()
        return [Span(action, self._seconds(a), self._seconds(b)) for action, a, b in self._marks]

    @property
    def began(self) -> float:
        """Returns ``time.perf_counter()`` at the start of the step."""
        return self._began

    def mark(self) -> Mark:
        """Returns the time now, or an event of the current stream."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark - self._began
        assert self._origin is not None
        return self._origin.elapsed_time(mark) / 1e3


def recorded_report(schedule: Schedule, spans: Mapping[int, Sequence[Span]]) -> Report:
    """Reports a step as it ran, in seconds, in the form in which a simulation is reported.

    Args:
        schedule: What was run.
        spans: The actions of every rank, on a common clock.
    """
    first = min(span.start for of_rank in spans.values() for span in of_rank)
    start = {s.action: s.start - first for of_rank in spans.values() for s in of_rank}
    end = {s.action: s.end - first for of_rank in spans.values() for s in of_rank}
    computed = {rank: [s for s in of_rank if not s.action.changes_state] for rank, of_rank in spans.items()}
    busy = tuple(sum(s.end - s.start for s in computed[rank]) for rank in range(schedule.num_ranks))
    return Report(max(end.values()), max(busy), peak_live(schedule), start, end, busy)


class MeanPhaseTimes:
    """Averages the times of the phases of each stage over micro-batches and steps."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, Phase], tuple[float, int]] = {}

    def add(self, spans: Sequence[Span]) -> None:
        """Takes in the actions of a step."""
        for span in spans:
            key = span.action.stage, span.action.phase
            total, num = self._sums.get(key, (0.0, 0))
            self._sums[key] = total + span.end - span.start, num + 1

    def means(self) -> dict[tuple[int, Phase], float]:
        """Returns mean seconds by stage and phase."""
        return {key: total / num for key, (total, num) in self._sums.items()}
