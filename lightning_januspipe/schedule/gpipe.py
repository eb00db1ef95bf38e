"""``gpipe``: all FE, then all FF, then all BF, then all BE."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import CHAIN_PHASES, Action, Costs, Schedule, costs_per_rank


def gpipe(num_ranks: int, num_microbatches: int, costs: Costs, *, max_live: int | None = None) -> Schedule:
    """Order the folded pipeline phase by phase, with every micro-batch live at once.

    Args:
        num_ranks: Number of pipeline ranks, one stage on each.
        num_microbatches: Number of micro-batches.
        costs: Phase times; the order does not depend on them.
        max_live: Most live micro-batches per rank, or None for no limit.

    Raises:
        ValueError: If ``max_live`` is less than ``num_microbatches``, as all of them are live here.
    """
    costs_per_rank(costs, num_ranks)
    if max_live is not None and max_live < num_microbatches:
        raise ValueError(
            f"'gpipe' keeps all {num_microbatches} micro-batches live, more than max_live={max_live}: "
            "take 'wavek' or '1f1b-fold', or raise max_live."
        )
    actions = tuple(
        tuple(Action(phase, rank, microbatch) for phase in CHAIN_PHASES for microbatch in range(num_microbatches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, num_microbatches, actions)
