"""What a schedule is asked for: the checked arguments that every generator gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_januspipe.schedule.costs import Costs, Memory, PhaseCosts, costs_per_stage
from lightning_januspipe.schedule.stage_placement import layouts

Auto = Literal["auto"]


@dataclass(frozen=True)
class Request:
    """The arguments of `build_schedule`, checked.

    Attributes:
        num_ranks: number P of pipeline ranks.
        num_microbatches: number M of micro-batches of one training step.
        costs: phase times of a rank's share, the same on all ranks, or one entry per rank or stage.
        wave_size: micro-batches per wave, or "auto".
        max_live: most micro-batches of which a rank may hold something, or None.
        chunks: stages per rank, or "auto".
        latency: time that a message between two ranks takes.
        memory: bytes that a micro-batch holds between its phases, or None where they are not known.
        memory_limit: most bytes that the micro-batches of one rank may hold, or None.
        placement: the rank of each stage, where it is not to be chosen, or None.
    """

    num_ranks: int
    num_microbatches: int
    costs: Costs
    wave_size: int | Auto = "auto"
    max_live: int | None = None
    chunks: int | Auto = "auto"
    latency: float = 0.0
    memory: Memory | None = None
    memory_limit: float | None = None
    placement: tuple[int, ...] | None = None

    def stage_costs(self, num_stages: int) -> tuple[PhaseCosts, ...]:
        """Costs of each of a number of stages."""
        return costs_per_stage(self.costs, self.num_ranks, num_stages)

    def folded_layouts(self, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The ranks of the stages that a folded schedule may choose from; see :meth:`stage_counts`."""
        if self.placement is not None:
            return [self.placement]
        return [p for number in self.stage_counts(choices) for p in layouts(self.num_ranks, number)]

    def stage_counts(self, choices: tuple[int, ...]) -> list[int]:
        """How many stages the chain may have.

        Costs per stage leave no choice. One entry per rank and "auto" leave the given ``choices`` of stages per rank.
        """
        entries = len(self.costs) if isinstance(self.costs, Sequence) else 1
        if entries not in (1, self.num_ranks):
            # No rank stays without a stage; `stage_costs` refuses fewer entries.
            return [max(entries, self.num_ranks)]
        chunks = choices if self.chunks == "auto" else (self.chunks,)
        return [chunk * self.num_ranks for chunk in chunks]
