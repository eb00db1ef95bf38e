"""``januspipe bench md`` runs the same trajectory with each calculator."""

from __future__ import annotations

from typing import Any

import pytest
from ase import Atoms

from lightning_januspipe.bench import molecular_dynamics as bench
from lightning_januspipe.bench.work import Work
from lightning_januspipe.calculator import JanusPipeCalculator

WORK = Work(num_layers=1, num_features=2, steps=1, cutoff=3.5, dtype="float64")


def made(work: Work) -> tuple[Any, Any]:
    potential = bench.reference(work)

    def own(atoms: Atoms) -> Any:
        return JanusPipeCalculator(potential, dtype="float64", skin=0.0)

    return potential, own


def test_rows_have_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def __init__(self, _: int) -> None: ...

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, function: Any, *arguments: Any, **_: object) -> list[Any]:
            return [function(*arguments)]

    monkeypatch.setattr(bench, "RankPool", Here)
    lines = bench.molecular_dynamics(WORK, rows=["own", "eager"], factory=f"{__name__}:made").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in rows] == [["108", "the package's own"], ["108", "eager"]]
    assert rows[0][-2:] == rows[1][-2:] and rows[0][4] == "1.00"
    with pytest.raises(ValueError, match="the row own needs --factory"):
        bench.molecular_dynamics(WORK, rows=["own"])
