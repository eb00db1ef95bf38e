"""Nequix's model for torch in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where nequix is absent:

    python tests/clients/environments.py nequix --folder /some/folder --run
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calculator_ranks
import numpy as np
import pytest
import torch
from ase import Atoms
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator, NequixAtomsAdapter
from lightning_januspipe.testing import RankPool

from .calculator_checks import check_calculator, check_checkpoint, check_single_precision, crystal
from .compare import ModelConformance, client_marks

pytestmark = client_marks("nequix")


class TestNequix(ModelConformance):
    make_module = factory("nequix_models", "make_module")
    datamodules = {"crystals": factory("nequix_models", "crystals")}


ELEMENTS = (13, 28, 29)


def graph_of(atoms: Atoms) -> Any:
    """Returns the graph that Nequix makes, which is in single precision by itself, in double precision."""
    from nequix.data import atomic_numbers_to_indices, dict_to_pytorch_geometric, preprocess_graph

    found = preprocess_graph(atoms, atomic_numbers_to_indices(ELEMENTS), 4.0, False)
    found["positions"], found["shifts"] = atoms.positions.copy(), found["shifts"].astype(np.float64)
    found["cell"] = None if found["cell"] is None else atoms.cell.array.copy()
    return dict_to_pytorch_geometric(found)


def test_calculator() -> None:
    """The model's own forward on the graphs that Nequix makes; its calculator does no more, and loads its own files."""
    module = factory("nequix_models", "make_module")().eval()

    def own(atoms: Atoms) -> dict[str, Any]:
        graph = graph_of(atoms)
        index = torch.zeros(len(atoms), dtype=torch.int64)
        sizes = (graph.n_node, graph.n_edge, index)
        energies, forces, stress = module.model(
            graph.x, graph.positions, graph.edge_attr, graph.edge_index, getattr(graph, "cell", None), *sizes
        )
        found = {"energy": energies.sum().detach(), "forces": forces.detach()}
        return found | ({} if stress is None else {"stress": stress[0].detach()})

    check_calculator(module, own, adapter=NequixAtomsAdapter(module.model, ELEMENTS), compiles=True)
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(module, adapter=NequixAtomsAdapter(module.model, ELEMENTS))
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)


def test_calculator_of_the_package(tmp_path: Path) -> None:
    """Nequix's own calculator of a file, in single precision as it computes."""
    from nequix.calculator import NequixCalculator
    from nequix.torch_impl.model import save_model

    module = factory("nequix_models", "make_module")()
    model = module.model.float()
    energies = dict.fromkeys(map(str, ELEMENTS), 0.0)
    sizes = {"n_layers": 2, "hidden_irreps": "8x0e + 4x1o", "lmax": 1, "radial_mlp_size": 8, "cutoff": 4.0}
    rest = {"radial_basis_size": 8, "radial_mlp_layers": 3, "radial_polynomial_p": 2.0, "mlp_init_scale": 4.0}
    plain = {"index_weights": False, "layer_norm": False, "shift": 0.0, "scale": 1.0, "avg_n_neighbors": 1.0}
    config = {"atomic_numbers": list(ELEMENTS), "atom_energies": energies, **sizes, **rest, **plain}
    save_model(str(tmp_path / "small.pt"), model, config)
    found = []
    for calculator in (
        JanusPipeCalculator(module, adapter=NequixAtomsAdapter(model, ELEMENTS)),
        NequixCalculator(model_path=str(tmp_path / "small.pt"), backend="torch", use_kernel=False),
    ):
        atoms = crystal()
        atoms.calc = calculator
        found.append([np.array(atoms.get_potential_energy()), atoms.get_forces(), atoms.get_stress()])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_elements_are_given() -> None:
    module = factory("nequix_models", "make_module")()
    with pytest.raises(ValueError, match=r"elements=None; the model of Nequix has 3 elements, and does not say which"):
        JanusPipeCalculator(module)
    with pytest.raises(ValueError, match=r"elements=\['Cu'\]; the model of Nequix has 3"):
        NequixAtomsAdapter(module.model, ["Cu"])
    module.model.atomic_numbers = torch.tensor(ELEMENTS)
    assert NequixAtomsAdapter(module.model).symbols == NequixAtomsAdapter(module.model, ["Al", "Ni", "Cu"]).symbols


def test_checkpoint(tmp_path: Path) -> None:
    check_checkpoint("nequix_models", "make_module", "crystals", tmp_path)


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    module = factory("nequix_models", "make_module")()
    check_single_precision(module, monkeypatch, NequixAtomsAdapter(module.model, ELEMENTS))


@pytest.mark.parametrize("periodic", [True, False])
def test_graph_ranks(pool: RankPool, periodic: bool) -> None:
    arguments = ("nequix_models", "make_module", periodic)
    for found in pool.run(calculator_ranks.differences, *arguments, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic)
