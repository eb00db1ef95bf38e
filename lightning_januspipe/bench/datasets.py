"""Measures memory and speed of datasets that are read from the disk, beside those that every rank holds in memory."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_januspipe.bench.work import Work, forget_peak, resident
from lightning_januspipe.testing import RankPool

_MOST_IN_MEMORY = 10_000
"""Structures that are held in memory at most: the memory of a rank is proportional to their number."""

_BATCH_SIZE = 32
_METALS = (("Cu", 3.61), ("Ni", 3.52), ("Al", 4.05))


@dataclass(frozen=True)
class Reading:
    """Holds one rank's measurement.

    Attributes:
        opening: CPU seconds until the data module is set up and its statistics are known.
        epochs: Seconds of each epoch, in which the rank reads its share.
        cpu: CPU seconds of each epoch.
        memory: Largest resident memory of both epochs, above that before the data module was made, in bytes.
        total: Sum over all positions that were read, which shows that the work was the same.
    """

    opening: float
    epochs: list[float]
    cpu: list[float]
    memory: int
    total: float


def write_structures(path: Path, number: int) -> None:
    """Writes small boxes of metal, rattled at random, with made labels."""
    rng = np.random.default_rng(0)
    corners = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    sites = np.concatenate([corners, corners + np.array([1.0, 0.0, 0.0])])
    with open(path, "w") as file:
        for _ in range(number):
            chosen = rng.integers(len(_METALS), size=len(sites))
            side = float(np.mean([_METALS[metal][1] for metal in chosen]))
            moved = rng.normal(scale=0.1, size=(len(sites), 3))
            moved -= moved.mean(axis=0)
            values = np.concatenate([sites * side + moved, -moved], axis=1)
            cell = f"{2 * side} 0 0 0 {side} 0 0 0 {side}"
            labels = f'energy={0.5 * float((moved**2).sum())} pbc="T T T"'
            file.write(f'{len(sites)}\nLattice="{cell}" Properties=species:S:1:pos:R:3:forces:R:3 {labels}\n')
            for metal, row in zip(chosen, values.tolist(), strict=True):
                file.write(f"{_METALS[metal][0]} {' '.join(f'{value:.8f}' for value in row)}\n")


def read_epochs(work: Work, file: str, cache: str | None) -> Reading:
    """Sets a data module up on this rank, and reads the rank's share of two epochs.

    Args:
        work: Has the cutoff.
        file: The structures.
        cache: Folder of the datasets that are read from the disk; None to hold the structures in memory.
    """
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    from lightning_januspipe.data import ASEDataModule, collate_structures

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo")
    forget_peak()
    before, began = resident("VmRSS"), time.process_time()
    data = ASEDataModule(file, cutoff=work.cutoff, dtype="float32", lazy=cache is not None, cache_dir=cache)
    data.setup("fit")
    data.statistics()
    opening = time.process_time() - began
    dataset: Any = data.dataset("train")
    epochs, cpu, total = [], [], 0.0
    for epoch in range(2):
        began, cpu_began = time.perf_counter(), time.process_time()
        order = np.random.default_rng(epoch).permutation(len(dataset))[rank::size].tolist()
        for batch in DataLoader(dataset, _BATCH_SIZE, sampler=order, collate_fn=collate_structures):
            total += float(batch["positions"].double().sum())
        epochs.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    return Reading(opening, epochs, cpu, resident("VmHWM") - before, total)


def datasets(work: Work, runs: int = 1, num_structures: int = 100_000) -> str:
    """Measures memory and speed of data that is read from the disk, beside data that every rank holds in memory."""
    lines = [
        "| structures | held | ranks | first opening, CPU (s) | next (s) | structures/s, epoch 1 | epoch 2 | "
        "CPU time of a structure, epoch 1 (ms) | epoch 2 | MB per rank |",
        "|---" * 10 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number in sorted({min(num_structures, _MOST_IN_MEMORY), num_structures}):
            file = Path(folder) / f"{number}.extxyz"
            write_structures(file, number)
            for where in ("in memory", "on disk") if number <= _MOST_IN_MEMORY else ("on disk",):
                for size in (1, 2):
                    cache = None if where == "in memory" else str(Path(folder) / f"cache-{number}-{size}")
                    lines.append(_row(work, str(file), cache, size, runs, number, where))
    return "\n".join(lines)


def _row(work: Work, file: str, cache: str | None, size: int, runs: int, number: int, where: str) -> str:
    found = []
    for _ in range(runs + (cache is not None)):
        with RankPool(size) as pool:
            found.append(pool.run(read_epochs, work, file, cache, timeout=3600, world_size=size))
    first = max(reading.opening for reading in found[0])
    later = found[1:] if cache is not None else found
    opening = float(np.median([max(reading.opening for reading in run) for run in later]))
    speeds = [number / float(np.median([max(r.epochs[epoch] for r in run) for run in later])) for epoch in range(2)]
    cpu = [1000 * float(np.median([sum(r.cpu[epoch] for r in run) for run in later])) / number for epoch in range(2)]
    memory = max(reading.memory for run in found for reading in run) / 1e6
    return (
        f"| {number} | {where} | {size} | {first:.1f} | {opening:.1f} | {speeds[0]:.0f} | {speeds[1]:.0f} | "
        f"{cpu[0]:.3f} | {cpu[1]:.3f} | {memory:.0f} |"
    )
