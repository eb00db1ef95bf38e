"""Places experts on ranks by the load of the steps, and moves and copies them only where it pays.

``januspipe bench experts`` counts what that gives.

Which elements a step has, and so how many rows each expert gets, is known before the step (Janus, arXiv 2604.15821,
plans its experts from the step's own atoms; how it does is not published, so this rule is a choice of this package).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_januspipe.expert_ranks.expert_costs import DECLARED, ExpertCosts, RowCost
from lightning_januspipe.expert_ranks.row_exchange import bounds_of


def rows_of_ranks(load: Sequence[int], order: Sequence[int], num_ranks: int) -> list[int]:
    """Returns the number of rows that each rank computes.

    Args:
        load: (K,) rows of each expert.
        order: (K,) experts in the order in which ranks hold them.
        num_ranks: X.
    """
    return [sum(load[e] for e in order[a:b]) for a, b in pairwise(bounds_of(len(order), num_ranks))]


def balanced_order(load: Sequence[int], num_ranks: int, current: Sequence[int]) -> list[int]:
    """Returns experts in an order with which ranks get about equal numbers of rows.

    Each rank holds as many experts as before. The largest experts choose first, each the rank with the fewest rows that
    has room. Then the sets of experts go to the ranks that hold most of them already.

    Args:
        load: (K,) rows of each expert.
        num_ranks: X.
        current: (K,) experts in the present order.
    """
    room = [b - a for a, b in pairwise(bounds_of(len(load), num_ranks))]
    sets: list[list[int]] = [[] for _ in room]
    for expert in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        free = [rank for rank in range(num_ranks) if len(sets[rank]) < room[rank]]
        sets[min(free, key=lambda rank: (sum(load[e] for e in sets[rank]), rank))].append(expert)
    held = [set(current[a:b]) for a, b in pairwise(bounds_of(len(load), num_ranks))]
    common = [(len(held[rank] & set(s)), rank, i) for rank in range(num_ranks) for i, s in enumerate(sets)]
    chosen: dict[int, int] = {}
    for _, rank, i in sorted(common, key=lambda c: (-c[0], c[1], c[2])):
        if rank not in chosen and i not in chosen.values() and len(sets[i]) == room[rank]:
            chosen[rank] = i
    return [expert for rank in range(num_ranks) for expert in sorted(sets[chosen[rank]])]


def num_moved(before: Sequence[int], after: Sequence[int], num_ranks: int) -> int:
    """Returns how many experts change their rank."""
    bounds = bounds_of(len(before), num_ranks)
    return sum(len(set(after[a:b]) - set(before[a:b])) for a, b in pairwise(bounds))


@dataclass(frozen=True)
class Guest:
    """Says that a rank holds a copy of another rank's expert for one step.

    Attributes:
        expert: the expert.
        rank: the rank that holds it beside its owner.
        rows: how many of its rows in the step this rank computes.
    """

    expert: int
    rank: int
    rows: int


@dataclass(frozen=True)
class Guests:
    """Holds the guests of a mixture's experts for one step.

    Attributes:
        guests: at most one for each expert and rank.
        slowest: rows of the rank with the most.
    """

    guests: tuple[Guest, ...]
    slowest: int

    def cost(self, guest: RowCost) -> int:
        """Returns the rows of the rank with the most, and the rows that cost as much as all copies."""
        return self.slowest + guest.of(len(self.guests))


def best_guests(load: Sequence[int], order: Sequence[int], num_ranks: int, guest: RowCost) -> Guests:
    """Returns the guests with which a step costs least; none where a copy costs more than the rows that it saves.

    One by one, the rank with the most rows shares its largest expert with the rank with the fewest, up to the mean of
    all ranks.

    Args:
        load: (K,) rows of each expert in the step.
        order: (K,) experts in the order in which ranks hold them.
        num_ranks: X.
        guest: what guests cost.
    """
    bounds, left = bounds_of(len(order), num_ranks), list(load)
    rows, share = rows_of_ranks(load, order, num_ranks), -(-sum(load) // num_ranks)
    guests: list[Guest] = []
    best = Guests((), max(rows))
    while max(rows) > share:
        busiest, idlest = rows.index(max(rows)), rows.index(min(rows))
        expert = max(order[bounds[busiest] : bounds[busiest + 1]], key=lambda e: (left[e], -e))
        given = min(rows[busiest] - share, share - rows[idlest], left[expert])
        guests.append(Guest(expert, idlest, given))
        left[expert] -= given
        rows[busiest] -= given
        rows[idlest] += given
        best = min(best, Guests(tuple(guests), max(rows)), key=lambda found: found.cost(guest))
    return best


class ExpertPlacement:
    """Decides where the experts of one mixture are, step by step, alike on all ranks that see the same loads.

    A better order is taken as soon as the rows that it would have saved since the last change cost as much as the move:
    whoever rents until the rent has reached the price, and then buys, pays at most twice what was possible.

    Args:
        num_experts: K.
        num_ranks: X.
        costs: What moves and guests cost, the same on all ranks.

    Attributes:
        costs: See above; other ones count from the next step on.
        order: (K,) experts in the order in which ranks hold them.
        num_moves: experts that have moved so far.
    """

    def __init__(self, num_experts: int, num_ranks: int, costs: ExpertCosts = DECLARED) -> None:
        self.costs = costs
        self.order, self.num_moves = list(range(num_experts)), 0
        self._num_ranks = num_ranks
        self._lost = 0
        self._seen = [0] * num_experts

    def see(self, load: Sequence[int], has_guests: bool = False) -> bool:
        """Takes the load of a step, before it runs; returns whether :attr:`order` has changed.

        Args:
            load: (K,) rows of each expert on all ranks.
            has_guests: whether experts may be copied for the step, so that a move saves only what copies do not.
        """
        self._seen = [a + b for a, b in zip(self._seen, load, strict=True)]
        best = balanced_order(self._seen, self._num_ranks, self.order)
        moved = num_moved(self.order, best, self._num_ranks)
        present, better = (self._cost(load, order, has_guests) for order in (self.order, best))
        self._lost += max(0, present - better)
        if not moved or self._lost < self.costs.move.of(moved):
            return False
        self.order, self._lost = best, 0
        self._seen = list(load)
        self.num_moves += moved
        return True

    def _cost(self, load: Sequence[int], order: Sequence[int], has_guests: bool) -> int:
        if has_guests:
            return best_guests(load, order, self._num_ranks, self.costs.guest).cost(self.costs.guest)
        return max(rows_of_ranks(load, order, self._num_ranks))
