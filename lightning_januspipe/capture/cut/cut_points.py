"""Where to cut a chain of operations: even work, small boundaries, and how many parts there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

# Sending as much as one layer border carries, in all four phases, counts as much as this share of a stage's work. That
# is a slow network: of a border of 128 numbers for each of 2,000 atoms and 20 ms of work, 4 MB in 1 ms.
BORDER_COST = 0.05
# The part of the work in which layer borders are sought, and how many of the boundaries there are smaller.
_MIDDLE, _SMALLER = (0.1, 0.9), 0.1
# A cut may carry at most this many times the bytes of a layer border.
_BYTES_SLACK = 4.0
# There may be as many stages as layers, and more where all of them do at least this share of the mean work.
_FAIR_SHARE = 0.5
# What has less than this share of the mean work of a layer is none.
_LEAST_LAYER = 0.1
# Of several positions in this share of the work the one with the smallest boundary stands for all.
_GRAIN = 0.005
_EVENNESS = 0.1
# Where a rank has several stages all cuts are tried, up to this many; of more a local search is made.
_TRIED_CUTS = 20_000

StageCost = Callable[[int, int], float]
"""The work of a stage that owns the operations from the first number to before the second one."""


@dataclass(frozen=True)
class CutPoints:
    """Where a chain can be cut.

    Attributes:
        points: operations after which a cut carries about as much as at a layer border, in order.
        border: bytes that a layer border carries.
        num_layers: how many parts there are that cannot be cut, because values of edges are alive all through them.
    """

    points: list[int]
    border: float
    num_layers: int


def find_cut_points(work: Sequence[float], ends: Sequence[tuple[float, int]]) -> CutPoints:
    """Find the layer borders of a chain, and what is as good.

    The values that are sent have as few rows as possible: those of atoms rather than of edges, unless what belongs to
    edges goes from layer to layer. Of the boundaries with these, one of the smallest tells what a border carries; the
    very smallest is that of a readout that ends in one number for each atom, far less than a layer's.

    Args:
        work: of each operation.
        ends: bytes that a cut after each operation carries, and rows of the longest value among these.
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
    layers = [sums[points[0]]]  # before the first point stages can compute all for themselves
    for a, b in pairwise(points):
        if any(ends[i][1] > rows for i in range(a + 1, b)):
            layers.append(sums[b] - sums[a])
    mean = sum(layers) / len(layers)
    return CutPoints(points, border, sum(layer >= _LEAST_LAYER * mean for layer in layers))


def most_parts(cost: StageCost, points: Sequence[int], length: int) -> int:
    """The largest number of stages that can all have a fair share of the work.

    Args:
        cost: of a stage.
        points: operations after which the chain can be cut.
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
    """The last operation of every stage but the last, so that the busiest rank has the least work.

    Evenness of the other stages and the bytes sent decide between cuts whose busiest ranks are nearly equal.

    Args:
        cost: of a stage.
        points: operations after which the chain can be cut, at least as many as cuts.
        sent: what a cut after each operation carries, in layer borders.
        num_stages: how many stages.
        placement: the rank of each stage; None for a rank for each stage.
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
    while placement is not None:  # from even stages to even ranks, one cut at a time
        moved = [[*found[:i], p, *found[i + 1 :]] for i in range(len(found)) for p in points]
        better = min((m for m in moved if all(a < b for a, b in pairwise(m))), key=score)
        if score(better) >= score(found):
            break
        found = better
    return found
