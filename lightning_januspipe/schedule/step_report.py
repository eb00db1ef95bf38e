"""Holds the times of one step, as `simulate` finds them or a recorder measures them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_januspipe.schedule.actions import Action, Phase, Schedule

MemoryCurve = tuple[tuple[float, float], ...]
"""A step function: (time, value from then on) in the order of time."""


@dataclass(frozen=True)
class Report:
    """Holds the timing of one step, simulated or recorded, in the unit of time of the costs.

    Args:
        makespan: Time from the first start to the last end.
        ideal: Time that the busiest rank of a folded pipeline works, M·T; no schedule of these stages is faster.
        peak_live: Per rank, the most live micro-batches; one is live from its first to its last action on the rank.
        start: Start time of every action.
        end: End time of every action.
        busy: Per rank, the time that it works; more than its share where FE is computed twice. Changes of sharded
            state run beside the work and do not count.
        memory: Per rank, the bytes held by micro-batches over time; empty where no memory costs were given.
    """

    makespan: float
    ideal: float
    peak_live: tuple[int, ...]
    start: Mapping[Action, float]
    end: Mapping[Action, float]
    busy: tuple[float, ...] = ()
    memory: tuple[MemoryCurve, ...] = ()

    @property
    def bubble_fraction(self) -> float:
        """Returns the share of the makespan in which the busiest rank waits, from 0 to 1."""
        return max(0.0, 1.0 - max(self.busy, default=self.ideal) / self.makespan)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Returns for each rank the share of the makespan in which it waits; one number where the ranks are alike."""
        return tuple(max(0.0, 1.0 - busy / self.makespan) for busy in self.busy or (self.ideal,))

    def describe_bubbles(self) -> str:
        """Returns the bubbles of all ranks in words: their mean, the worst, and which rank works more than the mean."""
        found = self.bubbles
        mean, worst = sum(found) / len(found), max(found)
        if worst - min(found) < 0.001:
            return f"bubbles {mean:.1%}"
        most = max(self.busy)
        excess = most * len(self.busy) / sum(self.busy) - 1
        return (
            f"bubbles {mean:.1%} on average, {worst:.1%} on rank {found.index(worst)}; rank {self.busy.index(most)} "
            f"works {excess:.0%} more than the mean"
        )

    @property
    def hidden_reduction(self) -> float | None:
        """Returns the share of the time of all REDUCE that passes before the last phase ends; None without REDUCE."""
        last = max(end for action, end in self.end.items() if not action.changes_state)
        spans = [(self.start[a], end) for a, end in self.end.items() if a.phase is Phase.REDUCE]
        total = sum(end - start for start, end in spans)
        return 1.0 - sum(max(0.0, end - max(start, last)) for start, end in spans) / total if total else None

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """Returns for each rank the most bytes that its micro-batches hold at once; empty without memory costs."""
        return tuple(max((held for _, held in curve), default=0.0) for curve in self.memory)


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Returns the most live micro-batches of each rank; a rank runs one action at a time, so its order decides."""
    peaks = []
    for order in schedule.actions:
        phases = [action for action in order if not action.changes_state]
        left = Counter(action.microbatch for action in phases)
        live: set[int] = set()
        peak = 0
        for action in phases:
            live.add(action.microbatch)
            peak = max(peak, len(live))
            left[action.microbatch] -= 1
            if not left[action.microbatch]:
                live.discard(action.microbatch)
        peaks.append(peak)
    return tuple(peaks)
