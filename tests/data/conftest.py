from __future__ import annotations

from pathlib import Path

import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator


@pytest.fixture
def reference_file():
    """Function that gives the path of a reference data file beside the repository, or skips the test."""

    def find(name: str) -> Path:
        path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / name
        if not path.is_file():
            pytest.skip(f"reference data file {name} is not there")
        return path

    return find


@pytest.fixture
def labelled():
    """Function that attaches labels to a structure as the results of a calculator."""

    def attach(atoms: Atoms, **results) -> Atoms:
        atoms = atoms.copy()
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    return attach
