"""Computes lower bounds on the time of a step, which schedules are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lightning_januspipe.schedule.costs import PhaseCosts


def lower_bound(
    costs: Sequence[PhaseCosts],
    placement: Sequence[int],
    num_microbatches: int,
    *,
    deferred: bool = False,
    latency: float = 0.0,
) -> float:
    """Returns a makespan that no folded schedule of these stages can beat.

    A rank starts when the first FE has reached its first stage. Without deferral, the stages before it still have to
    run the last BE when the rank has ended; deferred weight gradients can fill that time. With one equal stage on each
    rank the bound is M·T + (P-1)(t_FE + t_BE), or M·T + (P-1) t_FE with deferral. It is never less than the time of one
    micro-batch in all stages.

    Args:
        costs: Costs of each stage.
        placement: The rank of each stage.
        num_microbatches: Number of micro-batches.
        deferred: Whether WF and WE are actions of their own.
        latency: Time that a message between two ranks takes.
    """
    if not deferred:
        costs = [entry.fused() for entry in costs]
    hops = sum(a != b for a, b in pairwise(placement))
    one_microbatch = sum(entry.fe + entry.ff + entry.bf + entry.be for entry in costs) + 4 * hops * latency
    # The last BE is followed by its own WE at least.
    bound = one_microbatch + (costs[0].we if deferred else 0.0)
    work: dict[int, float] = {}
    ramp: dict[int, float] = {}
    elapsed = 0.0
    for stage, (rank, entry) in enumerate(zip(placement, costs, strict=True)):
        if stage and rank != placement[stage - 1]:
            elapsed += latency if deferred else 2 * latency
        work[rank] = work.get(rank, 0.0) + entry.total
        ramp.setdefault(rank, elapsed)
        elapsed += entry.fe if deferred else entry.fe + entry.be
    return max(bound, *(ramp[rank] + num_microbatches * work[rank] for rank in work))
