"""Times steps of molecular dynamics with the calculator, with the eager potential and with compiled code."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

from lightning_januspipe.bench.work import Work
from lightning_januspipe.testing import RankPool

_CELLS = (3, 6, 14)
"""Repetitions of the cubic cell of copper with four atoms, in each direction."""


@dataclass(frozen=True)
class Trajectory:
    """Holds the measurement of one process; times in seconds.

    Attributes:
        num_atoms: Atoms of the crystal.
        step: Median time of a step.
        cpu: Median CPU time of a step.
        first: Time of the first evaluation, in which the potential is compiled.
        energy: Total energy at the end in eV per atom, which shows that the work was the same.
        num_edges: Smallest and largest number of edges on the way.
    """

    num_atoms: int
    step: float
    cpu: float
    first: float
    energy: float
    num_edges: tuple[int, int]


def run_trajectory(work: Work, cells: int, compile: bool) -> Trajectory:
    """Runs steps of a crystal of copper at 600 K in this process.

    Args:
        work: The potential, which is untrained, and the number of timed steps.
        cells: Repetitions of the cubic cell in each direction.
        compile: Whether the potential is compiled.
    """
    import numpy as np
    import torch
    from ase import units
    from ase.build import bulk
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
    from ase.md.verlet import VelocityVerlet

    from lightning_januspipe.calculator import JanusPipeCalculator
    from lightning_januspipe.models import EquivariantPotential

    torch.set_num_threads(1)
    torch.manual_seed(0)
    potential = EquivariantPotential(
        ["Cu"],
        work.cutoff,
        num_layers=work.num_layers,
        num_features=work.num_features,
        l_max=work.l_max,
        avg_num_neighbors=42.0,
    )
    atoms = bulk("Cu", cubic=True) * cells
    atoms.calc = JanusPipeCalculator(potential, dtype=work.dtype, device="cpu", compile=compile)
    MaxwellBoltzmannDistribution(atoms, temperature_K=600, rng=np.random.default_rng(0))
    began = time.perf_counter()
    atoms.get_forces()
    first = time.perf_counter() - began
    dynamics = VelocityVerlet(atoms, timestep=2 * units.fs)
    dynamics.run(1)
    times, edges = [], []
    for _ in range(work.steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        dynamics.run(1)
        times.append((time.perf_counter() - began, time.process_time() - cpu_began))
        edges.append(atoms.calc.neighbors.edges(atoms).edge_index.shape[1])
    step, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    energy = atoms.get_total_energy() / len(atoms)
    return Trajectory(len(atoms), step, cpu, first, energy, (min(edges), max(edges)))


def molecular_dynamics(work: Work, runs: int = 1) -> str:
    """Times molecular dynamics with the calculator, eager and compiled, for crystals of up to --num_atoms atoms."""
    lines = [
        "| atoms | potential | steps/s | CPU time of a step (s) | speed | first evaluation (s) | edges | eV/atom |",
        "|---" * 8 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        for cells in _CELLS:
            if 4 * cells**3 > work.num_atoms and cells > _CELLS[0]:
                continue
            eager = 0.0
            for compile in (False, True):
                found = []
                for _ in range(runs):
                    with RankPool(1) as pool:
                        found += pool.run(run_trajectory, work, cells, compile, timeout=3600, world_size=1)
                step, cpu = (statistics.median(getattr(one, name) for one in found) for name in ("step", "cpu"))
                eager = eager or cpu
                one = found[0]
                lines.append(
                    f"| {one.num_atoms} | {'compiled' if compile else 'eager'} | {1 / step:.2f} | {cpu:.3f} | "
                    f"{eager / cpu:.2f} | {one.first:.1f} | {one.num_edges[0]} to {one.num_edges[1]} | "
                    f"{one.energy:.6f} |"
                )
    return "\n".join(lines)
