"""Orb's conservative potential with its own loss, on pipelines and graph ranks.

Slow, and skipped where orb-models is absent:

    python tests/clients/environments.py orb --folder /some/folder --run
"""

from __future__ import annotations

from pathlib import Path

import calculator_ranks
import pytest
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.testing import RankPool

from .calculator_checks import check_calculator, check_checkpoint, check_single_precision, crystal, results_of
from .compare import ModelConformance, client_marks

pytestmark = client_marks("orb_models", "orb-models")


class TestOrb(ModelConformance):
    """Batches of eight structures, in micro-batches of two."""

    make_module = factory("orb_small", "make_module")
    datamodules = {kind: factory("orb_small", kind) for kind in ("crystals", "molecules")}


class TestRunningMeans(ModelConformance):
    """Means that the loss updates are those of plain training where a batch is one micro-batch."""

    make_module = factory("orb_small", "make_with_running_means")
    datamodules = {"crystals": factory("orb_small", "crystals")}
    strategies = {name: s for name, s in ModelConformance.strategies.items() if s["num_microbatches"] == 1}


@pytest.mark.parametrize("repels", [True, False])
def test_calculator(repels: bool, float64: None) -> None:
    """Orb's own calculator, whose graphs have the default type."""
    module = factory("orb_small", "make_scaled")().eval()
    module.model.pair_repulsion = repels
    from orb_models.forcefield.calculator import ORBCalculator

    own = results_of(ORBCalculator(module.model, device="cpu"))
    # The energy of repulsion is the mean of the atoms in Orb, not their sum.
    check_calculator(module, own, unknown=None, repeated=1e-3 if repels else 1e-12, compiles=repels)


def test_structures_that_orb_does_not_take() -> None:
    atoms = crystal()
    atoms.pbc = [True, True, False]
    atoms.calc = JanusPipeCalculator(factory("orb_small", "make_module")())
    with pytest.raises(ValueError, match=r"pbc=\[True, True, False\]; Orb takes structures with three periodic"):
        atoms.get_potential_energy()


def test_checkpoint(tmp_path: Path) -> None:
    check_checkpoint("orb_small", "make_module", "crystals", tmp_path)


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    check_single_precision(factory("orb_small", "make_module")(), monkeypatch)


@pytest.mark.parametrize("periodic", [True, False])
def test_graph_ranks(pool: RankPool, periodic: bool) -> None:
    arguments = ("orb_small", "make_scaled", periodic)
    for found in pool.run(calculator_ranks.differences, *arguments, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic)
