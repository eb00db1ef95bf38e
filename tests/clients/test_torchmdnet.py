"""TorchMD-Net's models in its own LightningModule, on pipelines and graph ranks.

Slow, and skipped where torchmd-net is absent:

    python tests/clients/environments.py torchmdnet --folder /some/folder --run
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase import Atoms
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator

from .calculator_checks import box, check_calculator, cluster, crystal
from .compare import ModelConformance, client_marks

pytestmark = client_marks("torchmdnet", "torchmd-net")


class TestGraphNetwork(ModelConformance):
    make_module = factory("torchmdnet_models", "make_gn")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}


class TestTensorNet(ModelConformance):
    make_module = factory("torchmdnet_models", "make_tensornet")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}


class TestEquivariantTransformer(ModelConformance):
    make_module = factory("torchmdnet_models", "make_et")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}


@pytest.mark.parametrize("kind", ["et", "gn", "tensornet"])
@pytest.mark.parametrize("derivative", [True, False])
def test_calculator(kind: str, derivative: bool) -> None:
    """TorchMD-Net's own forward; its calculator of ASE is in single precision."""
    module = factory("torchmdnet_models", f"make_{kind}")().eval()
    model = module.model

    def own(atoms: Atoms) -> dict[str, Any]:
        numbers, positions = torch.tensor(atoms.numbers), torch.tensor(atoms.positions)
        cell = torch.tensor(atoms.cell.array) if atoms.pbc.any() else None
        model.derivative = True
        energy, forces = model(numbers, positions, box=cell)
        model.derivative = derivative
        return {"energy": energy.detach(), "forces": forces}

    model.derivative = derivative
    check_calculator(module, own, structures=(box, cluster), stress=False, compiles=derivative)


def test_cells_without_edges_are_refused() -> None:
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(factory("torchmdnet_models", "make_gn")())
    with pytest.raises(ValueError, match=r"finds no edges in the cell.*a diagonal of at least 8.0 Å"):
        atoms.get_potential_energy()
