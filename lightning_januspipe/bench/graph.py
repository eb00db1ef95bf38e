"""Measures memory and time of graph ranks that share one large structure, and counts the rows that they send."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_januspipe.bench.replicas import water_box
from lightning_januspipe.bench.work import Work, forget_peak, resident, trainer_of
from lightning_januspipe.graph.partition import halo_size, partition_atoms
from lightning_januspipe.testing import RankPool

SIZES = (1, 2, 4)
"""Graph ranks."""

_CUTOFFS = (4.0, 4.5, 5.0, 6.0)
_COPIES = (1, 2, 3)
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "100000", "MALLOC_MMAP_THRESHOLD_": "100000"}
"""Freed memory goes back to the system, so that the peak is what is in use."""


@dataclass(frozen=True)
class Usage:
    """Holds one rank's measurement of a step.

    Attributes:
        peak: Largest resident memory during the step, above the memory before it, in bytes.
        seconds: Seconds of the step.
        loss: Loss, which shows that the work was the same.
        num_atoms: Atoms of the structure.
    """

    peak: int
    seconds: float
    loss: float
    num_atoms: int


def step_on_one_structure(work: Work, graph_size: int) -> Usage:
    """Trains two steps on one structure of ``work.num_atoms`` atoms on this rank, and measures the second.

    Args:
        work: Model, data and number of steps, the same for every configuration.
        graph_size: Ranks that share the structure; 1 is plain Lightning.
    """
    import lightning

    from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
    from lightning_januspipe.models import PotentialModule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    large = emt_structures(1, sizes=(work.num_atoms,), vacancy_probability=0.0, seed=0)
    small = emt_structures(8, sizes=(32,), vacancy_probability=0.0, seed=1)  # what the potential is captured on
    dataset = StructureDataset([*large, *small], cutoff=work.cutoff, dtype=torch.float32)
    potential = work.potential(dataset, dataset.species)
    found: list[Usage] = []

    class Measure(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            forget_peak()
            self._before, self._began = resident("VmRSS"), time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            seconds, peak = time.perf_counter() - self._began, resident("VmHWM") - self._before
            found.append(Usage(peak, seconds, float(outputs["loss"]), len(large[0])))

    shared = {"pipeline_size": 1, "graph_size": graph_size, "num_microbatches": 1}
    trainer = trainer_of(shared if graph_size > 1 else None, 2, Measure())
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, sampler=[0, 0], collate_fn=collate_structures)
    trainer.fit(PotentialModule(potential), loader)
    return found[-1]


def memory_table(work: Work, runs: int) -> str:
    """Returns a table of peak memory and time of a step on one structure, for each number of graph ranks."""
    lines = ["| graph ranks | atoms | peak of a rank (MB) | of one process | step (s) |", "|---|---|---|---|---|"]
    first = 0.0
    with environment(ALLOCATOR):
        for size in SIZES:
            with RankPool(size) as pool:
                found = [
                    pool.run(step_on_one_structure, work, size, timeout=1800, world_size=size) for _ in range(runs)
                ]
            peak = statistics.median(max(r.peak for r in of_ranks) for of_ranks in found)
            seconds = statistics.median(max(r.seconds for r in of_ranks) for of_ranks in found)
            first = first or peak
            atoms = found[0][0].num_atoms
            lines.append(f"| {size} | {atoms} | {peak / 1e6:.0f} | {peak / first:.2f} | {seconds:.2f} |")
    return "\n".join(lines)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def volume_table(data: str | None = None, num_ranks: int = 4) -> str:
    """Returns a table of the rows that an all-gather of all atoms would send before each layer, over the rows sent.

    Args:
        data: A file, whose first structure is repeated; None for molecules of water on a lattice.
        num_ranks: Number G of graph ranks.
    """
    from ase.io import read

    from lightning_januspipe.data.neighbors import neighbor_list

    lines = [f"| atoms | {' | '.join(f'{c} Å' for c in _CUTOFFS)} |", "|---" * (1 + len(_CUTOFFS)) + "|"]
    for copies in _COPIES:
        unit: Any = water_box((4, 4, 4), np.random.default_rng(0)) if data is None else read(data, 0)
        box = unit.repeat(copies)
        cells = [f"{len(box)}"]
        for cutoff in _CUTOFFS:
            edges = torch.as_tensor(neighbor_list(box.positions, box.cell.array, box.pbc, cutoff)[0])
            positions = torch.as_tensor(box.positions)
            owner = partition_atoms(edges[1], edges[0], len(box), num_ranks, positions)
            cells.append(f"{len(box) * (num_ranks - 1) / halo_size(owner, edges[1], edges[0], num_ranks):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def graph(work: Work, runs: int = 1) -> str:
    """Measures memory and time of graph ranks that share the atoms of one structure, and counts what they exchange."""
    return f"{memory_table(work, runs)}\n\nAll-gather over exchange, 4 graph ranks:\n\n{volume_table(work.data)}"
