"""Builds the schedule of a given name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lightning_januspipe.schedule.actions import Schedule
from lightning_januspipe.schedule.costs import Costs, Memory
from lightning_januspipe.schedule.gpipe import gpipe
from lightning_januspipe.schedule.one_f_one_b import one_f_one_b
from lightning_januspipe.schedule.request import Auto, Request
from lightning_januspipe.schedule.simulate import simulate
from lightning_januspipe.schedule.unfolded import hanayo_unfolded, one_f_one_b_unfolded
from lightning_januspipe.schedule.validate import validate_schedule
from lightning_januspipe.schedule.wavek import wavek, wavek_deferred

ScheduleName = Literal["gpipe", "1f1b-fold", "1f1b-2nd", "hanayo-2nd", "wavek", "wavek-zb"]
"""The names of all schedules, for command lines and type checkers."""

GENERATORS: Mapping[str, Callable[[Request], Schedule]] = {
    "gpipe": gpipe,
    "1f1b-fold": one_f_one_b,
    "1f1b-2nd": one_f_one_b_unfolded,
    "hanayo-2nd": hanayo_unfolded,
    "wavek": wavek,
    "wavek-zb": wavek_deferred,
}
"""The generator of every schedule name."""

SEVERAL_STAGES = ("1f1b-2nd", "hanayo-2nd", "wavek-zb")
"""The schedules that can have more than one stage on a rank."""

CHOOSES_PLACEMENT = ("wavek-zb",)
"""The schedules that choose the rank of each stage."""

UNFOLDED = ("1f1b-2nd", "hanayo-2nd")
"""The schedules with split stages: FF and BF of a stage on another rank than its FE and BE."""

DEFERRED = ("wavek-zb",)
"""The schedules with WF and WE."""

SEARCHED = ("wavek", "wavek-zb")
"""The schedules that search an order for the costs."""


def build_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    *,
    wave_size: int | Auto = "auto",
    max_live: int | None = None,
    chunks: int | Auto = "auto",
    latency: float = 0.0,
    memory: Memory | None = None,
    memory_limit: float | None = None,
    placement: Sequence[int] | None = None,
    reserved: float = 0.0,
) -> Schedule:
    """Builds and validates the schedule of a given name; the same arguments give the same schedule on every rank.

    Args:
        name: ``gpipe``, ``1f1b-fold``, ``1f1b-2nd``, ``hanayo-2nd``, ``wavek`` or ``wavek-zb``.
        num_ranks: Number P of pipeline ranks.
        num_microbatches: Number M of micro-batches of one training step.
        costs: Times of one rank's share for one micro-batch: one entry for all ranks, one per rank, or one per stage.
        wave_size: Most micro-batches in a wave of ``wavek`` and ``wavek-zb``, which are also the most that a rank holds
            at once, or "auto" to search it. Schedules without waves ignore it.
        max_live: Most live micro-batches of a rank. None leaves the number to the schedule: M for ``gpipe``, P for the
            1F1B orders, up to 2P for the others, k where ``wave_size`` k is given.
        chunks: Stages per rank of ``wavek-zb``, or "auto" to let it choose 1 or 2. For the unfolded baselines, the
            stages per rank that the potential may be cut into. The other schedules have one stage on each rank.
        latency: Time of a message between two ranks, for the choice of the order.
        memory: Bytes that a micro-batch holds between its phases, given like ``costs``.
        memory_limit: Most bytes that the micro-batches of one rank may hold; ``wavek`` and ``wavek-zb`` keep fewer
            micro-batches live for it.
        placement: The rank of each stage of ``wavek-zb``; None lets it choose.
        reserved: Bytes of the memory limit that micro-batches may not take, on each rank.

    Raises:
        ValueError: The name is unknown, a size is not a whole number >= 1, ``costs`` does not fit ``num_ranks``, or the
            schedule cannot keep within ``max_live`` or ``memory_limit``.
    """
    if name not in GENERATORS:
        close = difflib.get_close_matches(str(name), GENERATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown schedule {name!r}, expected one of {', '.join(GENERATORS)}.{hint}")
    _check_size("num_ranks", num_ranks)
    _check_size("num_microbatches", num_microbatches)
    for argument, size in (("wave_size", wave_size), ("chunks", chunks)):
        if size != "auto":
            _check_size(argument, size, or_else="'auto'")
    if max_live is not None:
        _check_size("max_live", max_live, or_else="None")
    if not (isinstance(latency, (int, float)) and math.isfinite(latency) and latency >= 0):
        raise ValueError(f"latency is {latency!r}, expected a finite time >= 0.")
    if (memory is None) != (memory_limit is None):
        raise ValueError("memory and memory_limit belong together: give the bytes of a micro-batch and the limit.")
    if memory_limit is not None and not memory_limit >= 0:
        raise ValueError(f"memory_limit is {memory_limit!r}, expected a number of bytes >= 0 or None.")
    ranks = tuple(placement) if isinstance(placement, Sequence) else None
    if placement is not None and (
        ranks is None or name not in CHOOSES_PLACEMENT or set(ranks) != set(range(num_ranks))
    ):
        raise ValueError(
            f"placement is {placement!r}, expected the rank of each stage, with every rank from 0 to {num_ranks - 1}, "
            f"for {' or '.join(CHOOSES_PLACEMENT)}; {name!r} was asked for."
        )
    request = Request(
        num_ranks, num_microbatches, costs, wave_size, max_live, chunks, latency, memory, memory_limit, ranks, reserved
    )
    several = name in SEVERAL_STAGES
    request.stage_costs(len(ranks) if ranks else request.stage_counts((1,))[0] if several else num_ranks)
    schedule = GENERATORS[name](request)
    validate_schedule(schedule)
    if memory is not None and memory_limit is not None:
        peak = max(simulate(schedule, costs, comm=latency, memory=memory).peak_memory)
        if not request.fits(peak):
            raise ValueError(
                f"{name!r} holds up to {peak:.4g} bytes on a rank, more than {request.limit_in_words}: take 'wavek-zb' "
                "or 'wavek', which keep within a limit, make micro-batches smaller, or raise the limit."
            )
    return schedule


def _check_size(name: str, value: object, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        alternative = f" or {or_else}" if or_else else ""
        raise ValueError(f"{name} is {value!r}, expected a whole number >= 1{alternative}.")
