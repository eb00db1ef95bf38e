"""CHGNet's own package in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where chgnet is absent:

    python tests/clients/environments.py chgnet --folder /some/folder --run
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase import Atoms, units
from factories import factory

from .calculator_checks import boxed, check_calculator
from .compare import ModelConformance, client_marks

pytestmark = client_marks("chgnet")


class TestCHGNet(ModelConformance):
    make_module = factory("chgnet_models", "make_module")
    datamodules = {"crystals": factory("chgnet_models", "crystals")}


def test_calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CHGNet's own graphs, which are in single precision by themselves, and forward; its calculator does no more."""
    module = factory("chgnet_models", "make_module")().eval()
    from chgnet.graph import converter
    from pymatgen.io.ase import AseAtomsAdaptor

    monkeypatch.setattr(converter, "TORCH_DTYPE", torch.float64)

    def own(atoms: Atoms) -> dict[str, Any]:
        graph = module.model.graph_converter(AseAtomsAdaptor.get_structure(boxed(atoms)))
        out = module.model([graph], task="efs")
        energy, forces, stress = (out[name][0].detach().numpy() for name in "efs")
        return {"energy": energy * len(atoms), "forces": forces, "stress": stress * units.GPa}

    check_calculator(module, own, unknown="Am", compiles=True)
