"""The atoms of a structure are shared among graph ranks, and all ranks get what one process computes."""

from __future__ import annotations

import calculator_workers as workers
import pytest

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.models import EquivariantPotential
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_results_are_those_of_one_process(pool: RankPool, compile: bool) -> None:
    found = pool.run(workers.shared_evaluations, compile, world_size=2, timeout=1700)
    for of_rank in found:
        assert all(value < 1e-10 for value in of_rank["differences"].values()), of_rank["differences"]
        assert "micro-batch" in of_rank["error"] or "batch" in of_rank["error"]
    sizes = [len(atoms) for atoms in workers.structures() if len(atoms) > 1]
    shared = [sum(rank) for rank in zip(*(of_rank["atoms"] for of_rank in found), strict=True)]
    assert set(shared) == set(sizes), "each atom is on one rank, but for the structures that are too small"
    assert all(0 < number < max(sizes) for of_rank in found for number in of_rank["atoms"])


def test_errors() -> None:
    potential = EquivariantPotential(["Cu"], 4.0, num_layers=1, num_features=2)
    with pytest.raises(ValueError, match=r"graph_size=2, but there is one process. Start the script by torchrun"):
        JanusPipeCalculator(potential, graph_size=2)
    with pytest.raises(ValueError, match=r"graph_size=0; expected a positive integer"):
        JanusPipeCalculator(potential, graph_size=0)
