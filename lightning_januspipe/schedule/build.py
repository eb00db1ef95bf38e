"""Builds the schedule of a given name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Protocol

from lightning_januspipe.schedule.actions import Costs, Schedule
from lightning_januspipe.schedule.gpipe import gpipe
from lightning_januspipe.schedule.one_f_one_b import one_f_one_b
from lightning_januspipe.schedule.validate import validate
from lightning_januspipe.schedule.wavek import wavek


class Generator(Protocol):
    """Makes a schedule out of checked arguments."""

    def __call__(
        self, num_ranks: int, num_microbatches: int, costs: Costs, *, wave_size: int | str, max_live: int | None
    ) -> Schedule: ...


def _any_wave(generator: Callable[..., Schedule]) -> Generator:
    """Adapt a generator that has no waves."""

    def generate(
        num_ranks: int, num_microbatches: int, costs: Costs, *, wave_size: int | str, max_live: int | None
    ) -> Schedule:
        return generator(num_ranks, num_microbatches, costs, max_live=max_live)

    return generate


GENERATORS: Mapping[str, Generator] = {
    "gpipe": _any_wave(gpipe),
    "1f1b-fold": _any_wave(one_f_one_b),
    "wavek": wavek,
}
"""The generator of every schedule name."""


def build_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    *,
    wave_size: int | str = "auto",
    max_live: int | None = None,
) -> Schedule:
    """Build and prove the schedule of a given name; the same arguments give the same schedule on every rank.

    Args:
        name: ``gpipe``, ``1f1b-fold`` or ``wavek``.
        num_ranks: Number P of pipeline ranks.
        num_microbatches: Number M of micro-batches of one training step.
        costs: Times of one rank's share for one micro-batch, the same on all ranks or one entry per rank.
        wave_size: Micro-batches per wave of ``wavek``, or "auto" to search it. Schedules without waves do not read it.
        max_live: Most micro-batches that a rank may hold between the start of their FE and the end of their BE. None
            leaves it to the schedule: all for ``gpipe``, P for ``1f1b-fold``, 2P for ``wavek``.

    Raises:
        ValueError: If the name is unknown, a size is not a whole number >= 1, ``costs`` does not fit ``num_ranks``, or
            the schedule cannot keep within ``max_live``.
    """
    if name not in GENERATORS:
        close = difflib.get_close_matches(str(name), GENERATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown schedule {name!r}, expected one of {', '.join(GENERATORS)}.{hint}")
    _check_size("num_ranks", num_ranks)
    _check_size("num_microbatches", num_microbatches)
    if wave_size != "auto":
        _check_size("wave_size", wave_size, or_else="'auto'")
    if max_live is not None:
        _check_size("max_live", max_live, or_else="None")
    schedule = GENERATORS[name](num_ranks, num_microbatches, costs, wave_size=wave_size, max_live=max_live)
    validate(schedule)
    return schedule


def _check_size(name: str, value: object, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        alternative = f" or {or_else}" if or_else else ""
        raise ValueError(f"{name} is {value!r}, expected a whole number >= 1{alternative}.")
