"""SevenNet in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where SevenNet is absent:

    python tests/clients/environments.py sevennet --folder /some/folder --run
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from ase.stress import voigt_6_to_full_3x3_stress
from factories import factory

from .calculator_checks import check_calculator
from .compare import ModelConformance, client_marks

pytestmark = client_marks("sevenn")


class TestSevenNet(ModelConformance):
    """Forces and stress are sums over derivatives with respect to edge vectors."""

    make_module = factory("sevennet_models", "make_module")
    datamodules = {kind: factory("sevennet_models", kind) for kind in ("crystals", "molecules")}


def test_calculator() -> None:
    """The model's own forward on the graphs that SevenNet makes, which are in single precision by themselves."""
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    module = factory("sevennet_models", "make_module")().eval()
    model = copy.deepcopy(module.model)
    model.set_is_batch_data(False)

    def own(atoms: Any) -> dict[str, Any]:
        graph = unlabeled_atoms_to_graph(atoms, 4.0)
        data = AtomGraphData.from_numpy_dict(dict(graph))  # it replaces the entries of a dictionary
        for name, value in graph.items():
            if name != "data_info" and np.asarray(value).dtype.kind == "f":
                data[name] = torch.tensor(value, dtype=torch.float64)
        found = model(data)
        energy, forces, stress = (found[f"inferred_{n}"].detach().numpy() for n in ("total_energy", "force", "stress"))
        return {"energy": energy, "forces": forces, "stress": voigt_6_to_full_3x3_stress(-stress[[0, 1, 2, 4, 5, 3]])}

    check_calculator(module, own, compiles=True)
