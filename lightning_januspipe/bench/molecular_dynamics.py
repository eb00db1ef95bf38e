"""Times steps of molecular dynamics with the calculator, eager, compiled and against other calculators."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from lightning_januspipe.bench.work import Work, function_of
from lightning_januspipe.calculator import SkinNeighborList
from lightning_januspipe.testing import RankPool

_CELLS = (3, 6, 14)
"""Repetitions of the cubic cell of copper with four atoms, in each direction."""

_WARM_UP = 3
"""Steps before those that are timed, in which TorchScript optimizes what packages compile with it."""

RowName = Literal["eager", "compiled", "own"]

_TITLES: dict[RowName, str] = {"eager": "eager", "compiled": "compiled", "own": "the package's own"}


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


def run_trajectory(work: Work, cells: int, row: RowName, factory: str | None) -> Trajectory:
    """Runs steps of a crystal of copper at 600 K in this process.

    Args:
        work: The potential, which is untrained, and the number of timed steps.
        cells: Repetitions of the cubic cell in each direction.
        row: ``"eager"`` or ``"compiled"`` for the calculator of this package, ``"own"`` for the package's own.
        factory: A function as ``module:function``; see :func:`molecular_dynamics`. None for the reference potential.
    """
    import numpy as np
    import torch
    from ase import units
    from ase.build import bulk
    from ase.md.velocitydistribution import thermalize_momenta
    from ase.md.verlet import VelocityVerlet

    from lightning_januspipe.calculator import JanusPipeCalculator

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, make_own = (reference(work), None) if factory is None else function_of(factory)(work)
    atoms = bulk("Cu", cubic=True) * cells
    if row == "own":
        assert make_own is not None
        atoms.calc = make_own(atoms)
    else:
        atoms.calc = JanusPipeCalculator(module, dtype=work.dtype, device="cpu", compile=row == "compiled")
    thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(0))
    began = time.perf_counter()
    atoms.get_forces()
    first = time.perf_counter() - began
    dynamics = VelocityVerlet(atoms, timestep=2 * units.fs)
    dynamics.run(_WARM_UP)
    times, edges, counted = [], [], SkinNeighborList(work.cutoff)
    for _ in range(work.steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        dynamics.run(1)
        times.append((time.perf_counter() - began, time.process_time() - cpu_began))
        edges.append(counted.edges(atoms).edge_index.shape[1])
    step, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    energy = atoms.get_total_energy() / len(atoms)
    return Trajectory(len(atoms), step, cpu, first, energy, (min(edges), max(edges)))


def reference(work: Work) -> Any:
    """Returns the untrained reference potential."""
    from lightning_januspipe.models import EquivariantPotential

    sizes: dict[str, Any] = {"num_layers": work.num_layers, "num_features": work.num_features, "l_max": work.l_max}
    return EquivariantPotential(["Cu"], work.cutoff, avg_num_neighbors=42.0, **sizes)


def molecular_dynamics(work: Work, runs: int = 1, rows: list[RowName] | None = None, factory: str | None = None) -> str:
    """Times molecular dynamics with the calculator, eager and compiled, for crystals of up to --num_atoms atoms.

    Args:
        work: The potential, and the number of steps.
        runs: Runs of each row; the table has their medians.
        rows: eager, compiled, and own for the calculator of the factory's package. By default all that there are.
        factory: A function as module:function, which gets the work and returns a module of a package, and a function of
            a structure that returns the package's own calculator with the same weights. By default the reference
            potential is run.

    Returns:
        The table.

    Raises:
        ValueError: The row ``own`` is asked for without a factory, or there is no such factory.
    """
    rows = rows or (["eager", "compiled"] if factory is None else ["own", "eager", "compiled"])
    if "own" in rows and factory is None:
        raise ValueError("the row own needs --factory, which makes the calculator of a package")
    lines = [
        "| atoms | calculator | steps/s | CPU time of a step (s) | speed | first evaluation (s) | edges | eV/atom |",
        "|---" * 8 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        for cells in _CELLS:
            if 4 * cells**3 > work.num_atoms and cells > _CELLS[0]:
                continue
            found: dict[RowName, list[Trajectory]] = {row: [] for row in rows}
            for _ in range(runs):
                for row in rows:  # in turns, so that what else the machine does slows all rows
                    with RankPool(1) as pool:
                        found[row] += pool.run(run_trajectory, work, cells, row, factory, timeout=3600, world_size=1)
            first = statistics.median(one.cpu for one in found[rows[0]])
            for row, measured in found.items():
                step, cpu = (statistics.median(getattr(one, name) for one in measured) for name in ("step", "cpu"))
                one = measured[0]
                lines.append(
                    f"| {one.num_atoms} | {_TITLES[row]} | {1 / step:.2f} | {cpu:.3f} | {first / cpu:.2f} | "
                    f"{one.first:.1f} | {one.num_edges[0]} to {one.num_edges[1]} | {one.energy:.6f} |"
                )
    return "\n".join(lines)
