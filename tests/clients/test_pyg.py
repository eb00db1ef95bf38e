"""PyTorch Geometric's ViSNet and DimeNet++ in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where torch-geometric is absent:

    python tests/clients/environments.py pyg --folder /some/folder --run
"""

from __future__ import annotations

from typing import Any

import calculator_ranks
import pytest
import torch
from ase import Atoms
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.testing import RankPool

from .calculator_checks import check_calculator, cluster, crystal, larger_cluster
from .compare import ModelConformance, client_marks

pytestmark = client_marks("torch_geometric", "torch-geometric")


class TestViSNet(ModelConformance):
    make_module = factory("pyg_models", "make_visnet")
    datamodules = {"molecules": factory("pyg_models", "molecules")}


class TestDimeNet(ModelConformance):
    make_module = factory("pyg_models", "make_dimenet")
    datamodules = {"molecules": factory("pyg_models", "molecules")}


KINDS = ["visnet", "dimenet", "schnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_calculator(kind: str) -> None:
    """The forward of the package, or of the module that differentiates its energy."""
    module = factory("pyg_models", f"make_{kind}")().eval()

    def own(atoms: Atoms) -> dict[str, Any]:
        numbers, positions = torch.tensor(atoms.numbers), torch.tensor(atoms.positions)
        energy, forces = module.model(numbers, positions, torch.zeros(len(atoms), dtype=torch.int64))
        return {"energy": energy.detach(), "forces": forces.detach()}

    check_calculator(module, own, unknown="Lr", structures=[cluster, larger_cluster], stress=False, compiles=True)
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(module)
    with pytest.raises(ValueError, match=r"the structure is periodic, .*take molecules only"):
        atoms.get_potential_energy()


@pytest.mark.parametrize("kind", KINDS)
def test_graph_ranks(pool: RankPool, kind: str) -> None:
    for found in pool.run(calculator_ranks.differences, "pyg_models", f"make_{kind}", False, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic=False)
