"""Builds ``gpipe``: all FE, then all FF, then all BF, then all BE."""

from __future__ import annotations

from lightning_januspipe.schedule.actions import CRITICAL_PHASES, Action, Schedule
from lightning_januspipe.schedule.request import Request


def gpipe(request: Request) -> Schedule:
    """Orders the folded pipeline phase by phase, with every micro-batch live at once.

    Raises:
        ValueError: ``max_live`` is less than the number of micro-batches, which are all live here.
    """
    num_ranks, num_microbatches = request.num_ranks, request.num_microbatches
    if request.max_live is not None and request.max_live < num_microbatches:
        raise ValueError(
            f"'gpipe' keeps all {num_microbatches} micro-batches live, more than max_live={request.max_live}: "
            "take 'wavek' or '1f1b-fold', or raise max_live."
        )
    actions = tuple(
        tuple(Action(phase, rank, microbatch) for phase in CRITICAL_PHASES for microbatch in range(num_microbatches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, num_microbatches, actions)
