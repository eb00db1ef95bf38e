"""Packs samples into groups of equal work, for the micro-batches of one replica or of all replicas.

Graph-aware re-scheduling (JanusPipe, arXiv 2605.18404): samples differ in size by orders of magnitude, a pipeline waits
for its largest micro-batch, and replicas wait for the one with the most work. All functions depend on their arguments
only, so all ranks find the same groups.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

ATOM_WEIGHT = 4.0
"""The work of an atom without its edges, in units of the work of an edge."""

_MARGIN = 1e-4
"""The least share of the largest load by which an exchange has to lower it: less would be rounding."""

_Bin = list[tuple[float, int]]
"""Pairs (cost, sample), the cheapest first."""


def work(atoms: float | None, edges: float | None) -> float | None:
    """Returns the work of a sample, in units of the work of an edge.

    Args:
        atoms: Number of atoms; None if it is not known.
        edges: Number of edges; None if it is not known.

    Returns:
        edges + ``ATOM_WEIGHT`` × atoms; if only one number is known, that number; None if none is.
    """
    if edges is None or atoms is None:
        return atoms if edges is None else edges
    return edges + ATOM_WEIGHT * atoms


def pack_samples(costs: Sequence[float], num_bins: int, at_least: int = 1) -> list[list[int]]:
    """Deals samples into bins, so that the largest sum is as small as exchanges of single samples can make it.

    The largest samples are dealt first, each into the bin with the smallest sum so far (LPT). Then samples of the
    fullest bin move to others, or change places with smaller ones there, as long as that lowers the larger sum.

    Args:
        costs: Costs of the samples, not negative.
        num_bins: Number of bins.
        at_least: Number of samples that each bin gets, if there are enough.

    Returns:
        The indices of each bin's samples in ascending order. Bins are in the order in which they got their first
        sample, and are empty only if there are fewer samples than bins.

    Raises:
        ValueError: There are no bins, or a cost is not a number >= 0.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}; expected a positive number")
    values = [float(c) for c in costs]
    wrong = [c for c in values if not 0 <= c < float("inf")]
    if wrong:
        raise ValueError(f"the cost of a sample is {wrong[0]}; expected a number >= 0")
    bins = deal(values, num_bins, at_least)
    _improve(bins, at_least)
    return [sorted(sample for _, sample in content) for content in bins]


def plan(costs: Sequence[float], num_replicas: int, num_groups: int) -> list[list[list[int]]]:
    """Deals the samples of one step into the micro-batches of all replicas.

    Replicas wait for each other at the end of the step, and stages wait for the largest micro-batch of their pipeline,
    so a replica's sum counts together with its largest micro-batch. The better of two ways is taken: to deal samples
    into all micro-batches and these to replicas, or to deal samples to replicas and there into micro-batches.

    Args:
        costs: Costs of the samples of all replicas.
        num_replicas: Number of replicas, D.
        num_groups: Number of micro-batches of each replica, K. With fewer than D × K samples all replicas have the same
            smaller number.

    Returns:
        For each replica the indices of its micro-batches' samples. The k-th micro-batches of the replicas are about
        equal. The smallest come first, because a pipeline fills sooner with them.

    Raises:
        ValueError: There are fewer samples than replicas.
    """
    if len(costs) < num_replicas:
        raise ValueError(f"{len(costs)} samples for {num_replicas} replicas; expected at least one for each")
    num_groups = min(num_groups, len(costs) // num_replicas)

    def load(group: Sequence[int]) -> float:
        return sum(costs[i] for i in group)

    groups = pack_samples(costs, num_replicas * num_groups)
    dealt = pack_samples([load(g) for g in groups], num_replicas, at_least=num_groups)
    plans = [[[groups[g] for g in mine] for mine in dealt]]
    if num_replicas > 1:
        nested = []
        for mine in pack_samples(costs, num_replicas, at_least=num_groups):
            inner = pack_samples([costs[i] for i in mine], num_groups)
            nested.append([[mine[i] for i in group] for group in inner])
        plans.append(nested)
    best = min(plans, key=lambda p: max(sum(map(load, mine)) + max(map(load, mine)) for mine in p))
    return [sorted(mine, key=load) for mine in best]


def imbalance(costs: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    """Returns the largest sum of the groups' costs over the mean sum; 1 if all costs are zero."""
    loads = [sum(costs[i] for i in group) for group in groups]
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def deal(costs: Sequence[float], num_bins: int, at_least: int = 0) -> list[list[tuple[float, int]]]:
    """Does the first step of :func:`pack_samples`: each sample, the largest first, goes into the lightest bin.

    Returns:
        Pairs (cost, sample) of each bin, the cheapest first.
    """
    bins: list[_Bin] = [[] for _ in range(num_bins)]
    only_missing = False
    loads = [(0.0, 0, b) for b in range(num_bins)]  # among equal sums the bin with the fewest samples comes first
    missing, left = num_bins * at_least, len(costs)
    for sample in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if left <= missing and not only_missing:  # the samples that are left are just those that bins still lack
            only_missing = True
            loads = [entry for entry in loads if entry[1] < at_least]
            heapq.heapify(loads)
        load, num, b = loads[0]
        bins[b].append((costs[sample], sample))
        if only_missing and num + 1 == at_least and len(loads) > 1:
            heapq.heappop(loads)
        else:
            heapq.heapreplace(loads, (load + costs[sample], num + 1, b))
        missing -= num < at_least
        left -= 1
    for content in bins:
        content.sort()
    return bins


def _improve(bins: list[_Bin], at_least: int) -> None:
    """Exchanges samples of the fullest bin with others while that lowers its sum."""
    loads = [sum(cost for cost, _ in content) for content in bins]
    least = max(sum(loads) / len(loads), max((content[-1][0] for content in bins if content), default=0.0))
    for _ in range(8 * len(bins) + 64):
        fullest = max(range(len(bins)), key=loads.__getitem__)
        limit = loads[fullest] * (1 - _MARGIN)
        if limit <= least:
            return
        can_move = len(bins[fullest]) > at_least
        best, found = limit, None
        for other in sorted(range(len(bins)), key=loads.__getitem__):
            gap = loads[fullest] - loads[other]
            if loads[fullest] - gap / 2 >= best:  # as for all bins that follow
                break
            for mine in bins[fullest]:
                for its in _near(bins[other], mine[0] - gap / 2, can_move):
                    change = mine[0] - (its[0] if its else 0.0)
                    larger = max(loads[fullest] - change, loads[other] + change)
                    if larger < best:
                        best, found = larger, (other, mine, its, change)
        if found is None:
            return
        other, mine, its, change = found
        bins[fullest].remove(mine)
        insort(bins[other], mine)
        if its:
            bins[other].remove(its)
            insort(bins[fullest], its)
        loads[fullest] -= change
        loads[other] += change


def _near(content: _Bin, cost: float, can_move: bool) -> list[tuple[float, int] | None]:
    """Returns the samples of a bin next to a cost; None stands for no sample."""
    place = bisect_left(content, (cost, -1))
    found: list[tuple[float, int] | None] = list(content[max(place - 1, 0) : place + 1])
    return [None, *found] if can_move else found
