"""What graph ranks run to compare a calculator of a package's potential with one of a single process."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator


def structure(periodic: bool) -> Atoms:
    """Returns a crystal of sixteen atoms, or as many atoms without a cell."""
    atoms = bulk("Cu", a=3.75, cubic=True) * (2, 2, 1)
    atoms.symbols[::3] = "Al"
    atoms.rattle(0.08, seed=1)
    return atoms if periodic else Atoms(atoms.symbols, atoms.positions)


def adapter_of(program: str, model: Any) -> Any:
    """Returns the adapter that a program of this folder makes for a model, if it makes one; None otherwise."""
    adapter = getattr(import_module(program), "adapter", None)
    return adapter and adapter(model)


def differences(program: str, function: str, periodic: bool) -> dict[str, float]:
    """Returns the largest differences between results by two graph ranks and by one process, and the largest force.

    Args:
        program: File in this folder.
        function: Name of the function that makes the module.
        periodic: Whether the structure is a crystal.
    """
    module = factory(program, function)()
    adapter = adapter_of(program, module.model)
    whole, shared = (JanusPipeCalculator(module, adapter=adapter, graph_size=size) for size in (1, 2))
    found: dict[str, float] = {}
    for step in range(2):
        atoms = structure(periodic)
        atoms.rattle(0.02 * step, seed=7)
        results = []
        for calculator in (whole, shared):
            calculator.calculate(atoms)
            results.append(calculator.results)
        for name in results[0]:
            error = float(np.abs(results[0][name] - results[1][name]).max())
            found[name] = max(error, found.get(name, 0.0))
        found["largest force"] = float(np.abs(results[0]["forces"]).max())
    assert shared._graph_ranks is not None and shared._graph_ranks._pipeline is not None
    return found


def check(found: dict[str, float], periodic: bool) -> None:
    """Verifies that results by two graph ranks are those by one process, and that there was something to compare."""
    assert found.pop("largest force") > 1e-4
    assert {"energy", "forces"} <= found.keys() and ("stress" in found) <= periodic
    assert all(value < 1e-10 for value in found.values()), found
