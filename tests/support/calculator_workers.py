"""What the ranks of tests on calculators with several graph ranks run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms, units
from ase.build import bulk, fcc100
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from torch import Tensor

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.models import EquivariantPotential


def structures() -> list[Atoms]:
    """Returns a crystal, a slab and a cluster, and a structure that is too small to be shared."""
    crystal = bulk("Cu", a=3.6, cubic=True) * (2, 2, 1)
    slab = fcc100("Cu", (2, 2, 3), a=3.7, vacuum=4.0)
    cluster = (bulk("Cu", a=3.6, cubic=True) * 2)[:11]
    found = [crystal, slab, Atoms(cluster.symbols, cluster.positions), Atoms("Cu")]
    for index, atoms in enumerate(found):
        atoms.symbols[::3] = "Al"
        if len(atoms) > 1:
            atoms.rattle(0.1, seed=index)
    return found


def shared_evaluations(compile: bool) -> dict[str, Any]:
    """Returns the largest differences between shared and whole evaluations, and this rank's atoms of each."""
    torch.manual_seed(int(os.environ["RANK"]))  # the weights of the first rank count
    potential = EquivariantPotential(["Al", "Cu"], 4.0, num_layers=2, num_features=4).double()
    shared = JanusPipeCalculator(potential, graph_size=2, compile=compile)
    whole = JanusPipeCalculator(shared.potential)
    differences: dict[str, float] = dict.fromkeys(("energy", "forces", "stress"), 0.0)
    own_atoms: list[int] = []
    for atoms in structures():
        atoms.calc = shared
        thermalize_momenta(atoms, temperature_K=900, rng=np.random.default_rng(0))
        dynamics = VelocityVerlet(atoms, 4 * units.fs)
        for _ in range(2):
            dynamics.run(1)
            other = atoms.copy()
            other.calc = whole
            names = [name for name in differences if name != "stress" or atoms.cell.rank == 3]
            for name in names:
                own, expected = (calculator.get_property(name, atoms) for calculator in (shared, whole))
                differences[name] = max(differences[name], float(np.abs(own - expected).max()))
            if len(own_atoms) == 0:
                _count(shared, own_atoms)
    return {"differences": differences, "atoms": own_atoms, "error": _error(structures()[0], shared)}


def _count(calculator: JanusPipeCalculator, found: list[int]) -> None:
    """Notes from now on how many atoms this rank has of each structure."""
    executor: Any = calculator._graph_ranks._pipeline.executor
    evaluate: Callable[..., Any] = executor.evaluate

    def counted(schedule: Any, inputs: Any) -> Any:
        floats = [t for t in inputs[0].tensors if isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 2]
        found.append(min(map(len, floats)))  # positions, with fewer rows than shifts of cells
        return evaluate(schedule, inputs)

    executor.evaluate = counted


def _error(atoms: Atoms, shared: JanusPipeCalculator) -> str:
    """Returns the error if the ranks have different structures."""
    atoms.positions[0] += 0.1 * dist.get_rank()
    atoms.calc = shared
    try:
        atoms.get_forces()
    except PipelineError as error:
        return str(error)
    return ""
