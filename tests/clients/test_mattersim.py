"""MatterSim's M3GNet in its own ``Potential``, on pipelines and graph ranks.

Slow, and skipped where mattersim is absent:

    python tests/clients/environments.py mattersim --folder /some/folder --run
"""

from __future__ import annotations

from pathlib import Path

import calculator_ranks
import pytest
import torch
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.testing import RankPool

from .calculator_checks import check_calculator, check_checkpoint, check_single_precision, crystal, results_of
from .compare import ModelConformance, client_marks

pytestmark = client_marks("mattersim")


class TestM3GNet(ModelConformance):
    make_module = factory("mattersim_models", "make_module")
    datamodules = {kind: factory("mattersim_models", kind) for kind in ("crystals", "molecules")}


def test_calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """MatterSim's own calculator, whose graphs are in single precision by themselves."""
    module = factory("mattersim_models", "make_module")().eval()
    from mattersim.forcefield.potential import MatterSimCalculator

    monkeypatch.setattr(torch, "FloatTensor", torch.DoubleTensor)
    own = results_of(MatterSimCalculator(potential=module.model, device="cpu"))
    check_calculator(module, own, compiles=True)
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(module.model.model)
    assert atoms.get_potential_energy() == pytest.approx(float(own(atoms.copy())["energy"]), rel=0, abs=1e-10)


def test_checkpoint(tmp_path: Path) -> None:
    check_checkpoint("mattersim_models", "make_module", "crystals", tmp_path)


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    check_single_precision(factory("mattersim_models", "make_module")(), monkeypatch)


@pytest.mark.parametrize("periodic", [True, False])
def test_graph_ranks(pool: RankPool, periodic: bool) -> None:
    arguments = ("mattersim_models", "make_module", periodic)
    for found in pool.run(calculator_ranks.differences, *arguments, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic)
