"""Says what moves and guests of experts cost, in rows that a rank could compute in the same time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCost:
    """Says how many rows cost as much as a change.

    Attributes:
        once: rows for a change of any number of experts.
        each: rows for each of its experts.
    """

    once: int
    each: int

    def of(self, num: int) -> int:
        """Returns the cost of a change of ``num`` experts."""
        return self.once + self.each * num if num else 0


@dataclass(frozen=True)
class ExpertCosts:
    """Holds what changes cost of where the experts of a mixture are.

    Attributes:
        move: experts that move to other ranks, with their optimizer state.
        guest: experts that are copied for one step, and whose gradients come back.
    """

    move: RowCost
    guest: RowCost


DECLARED = ExpertCosts(RowCost(0, 100), RowCost(0, 66))
"""Costs that depend on no measurement.

With Adam's state an expert is sent as 12 bytes for each of its numbers in float32, as a guest as 8, and a row takes 12
operations for each number in the four phases. So 100 is the number of operations that a device does while it sends a
byte.
"""
