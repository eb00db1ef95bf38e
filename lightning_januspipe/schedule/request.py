"""Holds the checked arguments of `build_schedule`, which every generator gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_januspipe.schedule.costs import Costs, Memory, PhaseCosts, costs_per_stage
from lightning_januspipe.schedule.stage_placement import layouts

Auto = Literal["auto"]


@dataclass(frozen=True)
class Request:
    """Holds the arguments of `build_schedule`, which explains them."""

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
    reserved: float = 0.0

    def fits(self, peak: float) -> bool:
        """Returns whether bytes of micro-batches keep within the memory limit, beside those that are reserved."""
        return self.memory_limit is None or peak + self.reserved <= self.memory_limit

    @property
    def limit_in_words(self) -> str:
        """Returns the memory limit, and what of it is reserved, for errors."""
        limit = f"memory_limit={self.memory_limit:.4g} bytes per rank"
        return f"{limit}, and the state of the stages takes {self.reserved:.4g} of them" if self.reserved else limit

    def stage_costs(self, num_stages: int) -> tuple[PhaseCosts, ...]:
        """Returns the costs of each of a number of stages."""
        return costs_per_stage(self.costs, self.num_ranks, num_stages)

    def folded_layouts(self, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Returns the placements that a folded schedule may choose from; see :meth:`stage_counts`."""
        if self.placement is not None:
            return [self.placement]
        return [p for number in self.stage_counts(choices) for p in layouts(self.num_ranks, number)]

    def stage_counts(self, choices: tuple[int, ...]) -> list[int]:
        """Returns the numbers of stages that are possible.

        Costs per stage leave no choice. Costs per rank and "auto" leave the given ``choices`` of stages per rank.
        """
        entries = len(self.costs) if isinstance(self.costs, Sequence) else 1
        if entries not in (1, self.num_ranks):
            # Every rank needs a stage; `stage_costs` refuses fewer entries than ranks.
            return [max(entries, self.num_ranks)]
        chunks = choices if self.chunks == "auto" else (self.chunks,)
        return [chunk * self.num_ranks for chunk in chunks]
