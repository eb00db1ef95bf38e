"""Finds the largest structure that trains within a limit of memory, by what phases keep and by graph ranks.

Each attempt runs in fresh processes, which share what was traced and compiled. The largest size is found by straight
lines through two peaks, as memory grows with the number of atoms, until the peak is just below the limit.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, Literal

from lightning_januspipe.bench.graph import ALLOCATOR, environment
from lightning_januspipe.bench.work import Work, forget_peak, resident, trainer_of
from lightning_januspipe.capture.cache.store import VARIABLE
from lightning_januspipe.cli.plan_options import ByteSize
from lightning_januspipe.testing import RankPool

RowName = Literal["plain", "eager-recompute", "keep", "pointwise", "recompute", "graph", "graph-recompute"]

_ROWS: dict[RowName, tuple[str, int, dict[str, Any] | None]] = {
    "plain": ("plain Lightning", 1, None),
    "eager-recompute": ("januspipe, eager, recompute", 1, {"activation": "recompute"}),
    "keep": ("januspipe, compiled, keep", 1, {"compile": True, "activation": "keep"}),
    "pointwise": ("januspipe, compiled, pointwise", 1, {"compile": True, "activation": "pointwise"}),
    "recompute": ("januspipe, compiled, recompute", 1, {"compile": True, "activation": "recompute"}),
    "graph": ("januspipe, eager, 2 graph ranks", 2, {"graph_size": 2}),
    "graph-recompute": (
        "januspipe, compiled, recompute, 2 graph ranks",
        2,
        {"graph_size": 2, "compile": True, "activation": "recompute"},
    ),
}
_ATOMS_PER_CELL = 4
_LIMIT = ByteSize(4e9)
_MOST_ATTEMPTS = 8
_LARGEST_STEP = 10  # times as many atoms as the largest structure that fits


def peak_of_a_step(work: Work, strategy: dict[str, Any] | None, cache: str) -> int:
    """Trains on a small structure and twice on one of ``work.num_atoms`` atoms; returns the peak of the last step.

    The potential is captured, and compiled phases are compared with eager ones, on small structures.

    Args:
        work: Model and data.
        strategy: Arguments of the strategy; None for plain Lightning.
        cache: Folder of the cache of traced potentials and compiled phases.

    Returns:
        The largest resident memory of the process in bytes, with all libraries.
    """
    import lightning
    import torch

    from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
    from lightning_januspipe.models import PotentialModule

    os.environ[VARIABLE] = cache
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    large = emt_structures(1, sizes=(work.num_atoms,), vacancy_probability=0.0, seed=0)
    small = emt_structures(8, sizes=(32, 48, 64), vacancy_probability=0.0, seed=1)
    known = StructureDataset(small, cutoff=work.cutoff, dtype=torch.float32)  # which decides the scales
    dataset = StructureDataset([*large, *small], cutoff=work.cutoff, dtype=torch.float32, species=known.species)
    potential = work.potential(known, known.species)
    peaks: list[int] = []

    class Measure(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            forget_peak()

        def on_train_batch_end(self, *_: Any) -> None:
            peaks.append(resident("VmHWM"))

    loader = torch.utils.data.DataLoader(dataset, batch_size=1, sampler=[1, 0, 0], collate_fn=collate_structures)
    shared = None if strategy is None else {"pipeline_size": 1, "num_microbatches": 1, **strategy}
    trainer_of(shared, 3, Measure()).fit(PotentialModule(potential), loader)
    return peaks[-1]


def largest_size(peak: Callable[[int], int], limit: float, first: int, tolerance: float) -> tuple[int, int]:
    """Finds the most atoms whose peak is within a limit.

    Args:
        peak: Returns the peak for a number of atoms.
        limit: The most bytes.
        first: The number of atoms to begin with; the second is twice that.
        tolerance: How close to the limit the peak has to be, relative.

    Returns:
        The most atoms that fit, and their peak; zeros if not even the first number of atoms fits.
    """
    found: dict[int, int] = {}
    size = first
    while size not in found and len(found) < _MOST_ATTEMPTS:
        found[size] = peak(size)
        most = max((n for n, bytes in found.items() if bytes <= limit), default=0)
        if not most or found[most] >= (1 - tolerance) * limit:
            break
        size = _next_size(found, most, (1 - tolerance / 4) * limit, limit)
    return most, found.get(most, 0)


def _next_size(found: dict[int, int], most: int, aim: float, limit: float) -> int:
    """Returns the size to try next: where a line through two peaks reaches the aim, above the largest that fits."""
    if len(found) == 1:
        return compact_size(2 * most)
    a, b = sorted(found, key=lambda n: abs(found[n] - aim))[:2]
    slope = (found[b] - found[a]) / (b - a)
    wanted = a + (aim - found[a]) / slope if slope > 0 else 2 * most
    others = [n for n, bytes in found.items() if bytes > limit]
    top = min(others) if others else _LARGEST_STEP * most
    return compact_size(int(min(max(wanted, most), top)))


def compact_size(num_atoms: int) -> int:
    """Returns the most atoms of a nearly cubic box, up to a number: graph ranks cut long boxes at small faces."""
    side = int((num_atoms / _ATOMS_PER_CELL) ** (1 / 3) + 1e-9)
    blocks = combinations_with_replacement(range(max(side * 4 // 5, 1), side * 5 // 4 + 2), 3)
    sizes = (_ATOMS_PER_CELL * math.prod(sides) for sides in blocks)
    return max(size for size in sizes if size <= num_atoms)


def _largest_peak(work: Work, runs: int, name: RowName, cache: str, num_atoms: int) -> int:
    """Returns the largest peak of any rank in any run with a number of atoms."""
    title, ranks, strategy = _ROWS[name]
    own, found = replace(work, num_atoms=num_atoms), []
    for _ in range(runs):
        with RankPool(ranks) as pool:
            found += pool.run(peak_of_a_step, own, strategy, cache, timeout=7200)
    print(f"{title}: {num_atoms} atoms take {max(found) / 1e6:.0f} MB", flush=True)
    return max(found)


def largest(
    work: Work,
    runs: int = 1,
    rows: list[RowName] | None = None,
    limit: ByteSize = _LIMIT,
    tolerance: float = 0.03,
) -> str:
    """Finds the largest structure that trains within a limit of memory on a rank.

    Args:
        work: The model, and the number of atoms to begin with.
        runs: Runs of each attempt, of which the largest peak counts.
        rows: The configurations: plain; eager-recompute; compiled: keep, pointwise, recompute; graph and
            graph-recompute on two graph ranks. By default all.
        limit: The most resident memory of a process, with its libraries, such as 4GB.
        tolerance: How close to the limit the peak has to be, relative to it.
    """
    lines = ["| configuration | atoms | peak of a rank (MB) |", "|---|---|---|"]
    for name in rows or _ROWS:
        with tempfile.TemporaryDirectory() as cache, environment(ALLOCATOR):
            peak = partial(_largest_peak, work, runs, name, cache)
            atoms, found = largest_size(peak, limit, work.num_atoms, tolerance)
        lines.append(f"| {_ROWS[name][0]} | {atoms or 'fewer'} | {found / 1e6:.0f} |")
    return "\n".join(lines)
