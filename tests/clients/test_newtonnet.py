"""NewtonNet in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where newtonnet is absent:

    python tests/clients/environments.py newtonnet --folder /some/folder --run
"""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import calculator_ranks
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.stress import voigt_6_to_full_3x3_stress
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.testing import RankPool

from .calculator_checks import check_calculator, check_checkpoint, check_single_precision, cluster, results_of
from .compare import ModelConformance, client_marks

pytestmark = client_marks("newtonnet")


class TestNewtonNet(ModelConformance):
    make_module = factory("newtonnet_models", "make_module")
    datamodules = {kind: factory("newtonnet_models", kind) for kind in ("crystals", "molecules")}


def with_virial(model: Any) -> Any:
    """Returns a copy of a model that infers the virial too, made as NewtonNet's calculator makes it."""
    from newtonnet.layers.scalers import get_scaler_by_string
    from newtonnet.models.output import get_aggregator_by_string, get_output_by_string

    made = copy.deepcopy(model)
    made.infer_properties = [*made.infer_properties, "virial"]
    made.output_layers.append(get_output_by_string("virial"))
    made.scalers.append(get_scaler_by_string("virial"))
    made.aggregators.append(get_aggregator_by_string("virial"))
    made.eval()
    return made


def test_calculator() -> None:
    """The model's own forward on edges that ASE finds."""
    module = factory("newtonnet_models", "make_module")()
    model = with_virial(module.model)
    from torch_geometric.data import Data

    def own(atoms: Atoms) -> dict[str, Any]:
        (first, second), offsets = import_module("client_parts").edges_of(atoms)
        positions = torch.tensor(atoms.positions)
        vectors = positions[first] - positions[second] - offsets @ torch.tensor(atoms.cell.array)
        data = Data(z=torch.tensor(atoms.numbers).long(), edge_index=torch.stack([first, second]))
        out = model(data.z, vectors, data.edge_index, torch.zeros(len(atoms)).long())
        stress = -out.virial[0].detach().numpy() / 2 / atoms.cell.volume if atoms.pbc.all() else None
        return {"energy": out.energy.detach(), "forces": out.gradient_force.detach(), "stress": stress}

    check_calculator(module, own, unknown=None, compiles=True)


def rectangular() -> Atoms:
    """Returns 32 atoms in a cell with right angles of at least twice the cutoff."""
    atoms = bulk("Cu", a=4.1, cubic=True) * 2
    atoms.symbols[:9] = ["Al", "Ni", "Al"] * 3
    atoms.set_cell(atoms.cell.array * [[1.0], [1.02], [1.05]], scale_atoms=True)
    atoms.rattle(0.08, seed=4)
    return atoms


def test_calculator_of_the_package(tmp_path: Path) -> None:
    """NewtonNet's own calculator, which finds the nearest image of each atom only, and right in such cells only."""
    from newtonnet.utils.ase_interface import MLAseCalculator

    module = factory("newtonnet_models", "make_module")()
    torch.save(module.model, tmp_path / "model.pt")

    def own(atoms: Atoms) -> dict[str, Any]:
        names = ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])]
        other = MLAseCalculator(str(tmp_path / "model.pt"), properties=names, precision="float64")
        other.calculate(atoms)
        stress = voigt_6_to_full_3x3_stress(other.results["stress"]) if "stress" in names else None
        return {**other.results, "stress": stress}

    check_calculator(module, own, unknown=None, structures=(rectangular, cluster))


def test_energies_alone() -> None:
    """A model that infers no forces is differentiated by the calculator."""
    module = factory("newtonnet_models", "make_module")()
    whole, bare = module.model, copy.deepcopy(module.model)
    bare.infer_properties = ["energy"]
    for part in (bare.output_layers, bare.scalers, bare.aggregators):
        del part[1:]
    bare.embedding_layer.requires_dr = False
    check_calculator(bare, results_of(JanusPipeCalculator(whole)), unknown=None, compiles=True)


def test_checkpoint(tmp_path: Path) -> None:
    check_checkpoint("newtonnet_models", "make_module", "crystals", tmp_path)


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    check_single_precision(factory("newtonnet_models", "make_module")(), monkeypatch)


@pytest.mark.parametrize("periodic", [True, False])
def test_graph_ranks(pool: RankPool, periodic: bool) -> None:
    arguments = ("newtonnet_models", "make_module", periodic)
    for found in pool.run(calculator_ranks.differences, *arguments, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic)
