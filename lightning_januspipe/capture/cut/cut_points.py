"""Decides where a chain of operations is cut: even work, small boundaries, and how many stages there can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

# Sending a layer border in all four phases counts as much as this share of a stage's work. That is a slow network: with
# 128 numbers for each of 2,000 atoms and 20 ms of work, 4 MB take 1 ms.
BORDER_COST = 0.05
# Layer borders are searched in this part of the work; this share of its boundaries is smaller than a layer border.
_MIDDLE, _SMALLER = (0.1, 0.9), 0.1
# A cut may carry at most this many times the bytes of a layer border.
_BYTES_SLACK = 4.0
# There may be as many stages as layers, and more if every stage does at least this share of the mean work.
_FAIR_SHARE = 0.5
# A part with less than this share of the mean work of a layer does not count as a layer.
_LEAST_LAYER = 0.1
# Of all cut points within this share of the work, only the one with the smallest boundary is considered.
_GRAIN = 0.005
# Weight of the sum of the squared shares of work, beside the largest load of a rank.
_EVENNESS = 0.1
# Where a rank has several stages, all cuts are tried if there are at most this many; else a local search is made.
_TRIED_CUTS = 20_000

StageCost = Callable[[int, int], float]
"""From a first position and the position after the last one to the work of the stage that owns these operations."""


@dataclass(frozen=True)
class CutPoints:
    """Holds the places where a chain can be cut.

    Attributes:
        points: positions of the operations after which a cut sends about as much as at a layer border, in order.
        border: bytes that are sent at a layer border.
        num_layers: number of parts that cannot be cut, because values of edges are alive all through them.
    """

    points: list[int]
    border: float
    num_layers: int


def find_cut_points(work: Sequence[float], ends: Sequence[tuple[float, int]]) -> CutPoints:
    """Finds the layer borders of a chain, and places that are as good.

    The values that are sent have as few rows as possible: values of atoms rather than of edges, unless features of
    edges go from layer to layer. One of the smallest boundaries with so few rows tells how many bytes a layer border
    sends. The very smallest boundary does not: it is inside a readout, which sends one number for each atom.

    Args:
        work: work of each operation.
        ends: for a cut after each operation, the bytes that it sends, and the rows of the longest value that it sends.
    """
    sums = list(accumulate(work))
    whole = sums[-1] or 1.0
    low, high = _MIDDLE
    cuttable = [i for i, (size, _) in enumerate(ends[:-1]) if 0 < size < math.inf]
    middle = [i for i in cuttable if low <= sums[i] / whole <= high] or cuttable
    if not middle:
        return CutPoints([], 0.0, 1)
    rows = min(ends[i][1] for i in middle)
    sizes = sorted(ends[i][0] for i in middle if ends[i][1] <= rows)
    border = sizes[int(_SMALLER * len(sizes))]
    best: dict[int, int] = {}
    for i in (i for i in cuttable if ends[i][0] <= _BYTES_SLACK * border and ends[i][1] <= rows):
        bucket = int(sums[i] / whole / _GRAIN)
        if bucket not in best or ends[i][0] < ends[best[bucket]][0]:
            best[bucket] = i
    points = sorted(best.values())
    layers = [sums[points[0]]]  # every stage can compute for itself what comes before the first point
    for a, b in pairwise(points):
        if any(ends[i][1] > rows for i in range(a + 1, b)):
            layers.append(sums[b] - sums[a])
    mean = sum(layers) / len(layers)
    return CutPoints(points, border, sum(layer >= _LEAST_LAYER * mean for layer in layers))


def most_parts(cost: StageCost, points: Sequence[int], length: int) -> int:
    """Returns the largest number of stages that can all have a fair share of the work.

    Args:
        cost: the work of a stage.
        points: positions of the operations after which the chain can be cut.
        length: number of operations.
    """
    ends = [*(p + 1 for p in points), length]
    whole = cost(0, length)
    least = [cost(0, end) for end in ends]  # work of the smallest stage, in the best chain up to each end
    most = 1
    while most <= len(points):
        least = [max((min(least[i], cost(ends[i], end)) for i in range(k)), default=0.0) for k, end in enumerate(ends)]
        if least[-1] * (most + 1) < _FAIR_SHARE * whole:
            break
        most += 1
    return most


def best_cuts(
    cost: StageCost,
    points: Sequence[int],
    sent: Sequence[float],
    num_stages: int,
    placement: Sequence[int] | None = None,
) -> list[int]:
    """Returns the position of the last operation of every stage but the last, so that the busiest rank has least work.

    Between cuts whose busiest ranks have nearly the same work, the evenness of the other stages and the bytes sent
    decide.

    Args:
        cost: the work of a stage.
        points: positions of the operations after which the chain can be cut, at least as many as cuts.
        sent: what a cut after each operation sends, in units of a layer border.
        num_stages: length of the chain.
        placement: the rank of each stage; None for one stage on each rank.
    """
    assert len(points) >= num_stages - 1, "there are fewer parts than stages"
    if num_stages == 1:
        return []
    length = len(sent)
    total = cost(0, length)
    ranks = range(num_stages) if placement is None else placement

    def score(cuts: Sequence[int], is_whole: bool = True) -> float:
        edges = [0, *(c + 1 for c in cuts), *([length] if is_whole else [])]
        shares = [cost(a, b) / total for a, b in pairwise(edges)]
        loads: dict[int, float] = {}
        for rank, share in zip(ranks if is_whole else range(len(shares)), shares, strict=True):
            loads[rank] = loads.get(rank, 0.0) + share
        uneven = _EVENNESS * sum(share * share for share in shares)
        messages = BORDER_COST * sum(max(sent[c], 1.0) for c in cuts) / max(len(cuts), 1)
        return len(set(ranks)) * (max(loads.values()) + uneven) + messages

    if placement is not None and math.comb(len(points), num_stages - 1) <= _TRIED_CUTS:
        return min(([*cuts] for cuts in combinations(points, num_stages - 1)), key=score)
    best = {c: [c] for c in points}
    for _ in range(num_stages - 2):
        options = {c: [[*cuts, c] for b, cuts in best.items() if b < c] for c in points}
        best = {c: min(o, key=lambda cuts: score(cuts, False)) for c, o in options.items() if o}
    found = min(best.values(), key=score)
    while placement is not None:  # move one cut at a time while the ranks' work gets more even
        moved = [[*found[:i], p, *found[i + 1 :]] for i in range(len(found)) for p in points]
        better = min((m for m in moved if all(a < b for a, b in pairwise(m))), key=score)
        if score(better) >= score(found):
            break
        found = better
    return found
