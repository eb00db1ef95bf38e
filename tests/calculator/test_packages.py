"""What adapters of other packages need none of the packages for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces
from torch import Tensor, nn

from lightning_januspipe import calculator
from lightning_januspipe.calculator import JanusPipeCalculator, NequixAtomsAdapter, SkinNeighborList, packages
from lightning_januspipe.calculator.packages.of_fairchem import only_output
from lightning_januspipe.calculator.packages.of_matris import paired_line_graph
from lightning_januspipe.calculator.packages.package_parts import double_for_float
from lightning_januspipe.calculator.skin import Edges


@pytest.mark.parametrize("missing", [None, 7])
def test_edges_without_their_opposite_are_left_out(missing: int | None) -> None:
    edges = SkinNeighborList(3.0).edges(bulk("Cu", cubic=True))
    kept = np.arange(edges.edge_index.shape[1]) != missing
    found, graph = paired_line_graph(Edges(edges.edge_index[:, kept], *(x[kept] for x in edges[1:])), 4, 3.0)
    assert found.edge_index.shape[1] == 48 - 2 * (missing is not None)
    assert (np.bincount(graph.undirected.numpy()) == 2).all()


class NequixTorch(nn.Module):
    """Stands for Nequix's model: springs between neighbours. Like those of some packages, ``train`` returns nothing."""

    __module__ = "nequix.torch_impl.model"

    def __init__(self) -> None:
        super().__init__()
        self.cutoff, self.n_species = 3.0, 2
        self.stiffness = nn.Parameter(torch.ones((), dtype=torch.float64))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(
        self, species: Tensor, positions: Tensor, edge_attr: Tensor, edge_index: Tensor, cell: Tensor, **sizes: Tensor
    ) -> Any:
        positions.requires_grad_(True)
        source, target = edge_index
        vectors = positions[source] - positions[target] + edge_attr @ cell[0]
        of_edges = self.stiffness * (vectors.norm(dim=1) - 2.5).square() / 2
        energies = torch.zeros(len(species), dtype=of_edges.dtype).index_add(0, target, of_edges)
        (gradient,) = torch.autograd.grad([energies.sum()], [positions])
        return energies, -gradient, None


def test_an_adapter_finds_the_potential_of_its_package() -> None:
    module = nn.Sequential(nn.Linear(2, 2), NequixTorch())
    with pytest.raises(ValueError, match=r"elements=None; the model of Nequix has 2 elements, and does not say which"):
        JanusPipeCalculator(module)
    with pytest.raises(ValueError, match=r"elements=\[29\]; the model of Nequix has 2 elements"):
        NequixAtomsAdapter(module[1], [29])
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    for elements in ([13, 29], ["Al", "Cu"]):
        atoms.calc = JanusPipeCalculator(module, adapter=NequixAtomsAdapter(module[1], elements))
        assert isinstance(atoms.calc.potential, NequixTorch) and not atoms.calc.potential.training
        np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-5), rtol=0, atol=1e-6)
    assert module[1].training and module[1].stiffness.requires_grad


def test_adapters_are_listed_once() -> None:
    found = [name for name in calculator.__all__ if name.endswith("AtomsAdapter") and name != "AtomsAdapter"]
    assert sorted(found) == sorted(packages.__all__)
    assert {of.__name__ for of in packages._OF_CLASSES.values()} == set(packages.__all__)


def test_double_for_float() -> None:
    single = torch.zeros(1)
    for dtype, inside in ((torch.float64, torch.float64), (torch.float32, torch.float32)):
        with double_for_float(dtype):
            assert single.float().dtype == inside
        assert single.double().float().dtype == torch.float32


@pytest.mark.parametrize(
    ("output", "tasks", "energy"),
    [
        ({"efs": {"energy": 1, "forces": 2, "embeddings": 3}}, [], 1),
        ({"efs": {"energy": {"energy": 1}, "forces": {"forces": 2}}}, ["omat"], 1),
        ({"a": {"omat_energy": {"energy": 1}, "omol_energy": {"energy": 0}}}, ["omat", "omol"], 1),
        ({"omat_energy": 1, "omol_energy": 0, "omat_forces": 2}, ["omat", "omol"], 1),
        ({"forces": {"forces": 2}}, [], None),
    ],
)
def test_outputs_of_fairchem_heads(output: dict[str, Any], tasks: list[str], energy: int | None) -> None:
    assert only_output(output, "energy", "omat" if tasks else "", tasks) == energy


def test_several_energies_of_fairchem_heads() -> None:
    output: dict[str, Any] = {"a": {"energy": 1}, "b": {"energy": 2}}
    with pytest.raises(ValueError, match=r"give several of energy: \['a.energy', 'b.energy'\]"):
        only_output(output, "energy", "", [])
