"""Places stages on ranks."""

from __future__ import annotations

from collections.abc import Sequence


def snake(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """Places stages down the ranks and up again: 0 to P-1 on ranks 0 to P-1, the next P on ranks P-1 to 0, and so on.

    Where the direction turns, two neighbouring stages share a rank and nothing is sent.
    """
    rounds = (divmod(stage, num_ranks) for stage in range(num_stages))
    return tuple(rank if turn % 2 == 0 else num_ranks - 1 - rank for turn, rank in rounds)


def loop(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """Places stages down the ranks again and again: stage s on rank s mod P.

    Every boundary is a message, but a rank's stages are far from each other, so that a potential whose first and last
    layers are cheap is shared more evenly.
    """
    return tuple(stage % num_ranks for stage in range(num_stages))


def layouts(num_ranks: int, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """Returns the folded placements to choose from."""
    return tuple(dict.fromkeys((snake(num_ranks, num_stages), loop(num_ranks, num_stages))))


def cut_evenly(costs: Sequence[float], num_parts: int) -> list[int]:
    """Cuts a sequence into contiguous parts so that the largest sum of costs is least.

    Args:
        costs: Costs of the elements, in order; at least as many as parts, so that no part is empty.
        num_parts: Number of parts.

    Returns:
        The index of the part of each element.
    """
    assert len(costs) >= num_parts, "every part needs an element"
    low, high = max(costs), sum(costs)
    best = _fill(costs, num_parts, high)
    assert best is not None
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = _fill(costs, num_parts, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _fill(costs: Sequence[float], num_parts: int, largest: float) -> list[int] | None:
    """Fills part after part up to a sum; returns None if that takes more parts."""
    parts: list[int] = []
    part, held = 0, 0.0
    for index, cost in enumerate(costs):
        left_for_others = len(costs) - index == num_parts - 1 - part
        if parts and parts[-1] == part and (held + cost > largest * (1 + 1e-12) or left_for_others):
            part, held = part + 1, 0.0
        if part == num_parts:
            return None
        held += cost
        parts.append(part)
    return parts
