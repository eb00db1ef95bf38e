"""A model of metatomic gives what the calculator gives, by metatomic's own calculator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.deploy.metatomic import EnergiesOfAtoms, export_metatomic
from lightning_januspipe.deploy.standalone import example_arguments
from lightning_januspipe.models import EquivariantPotential, MatRISMoE

SPECIES = ["H", "O", "Cu"]


@pytest.fixture(params=["equivariant", "tasks", "experts"])
def potential(request: pytest.FixtureRequest) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        if request.param == "experts":
            return MatRISMoE.from_size("tiny", SPECIES, cutoff=3.5, angle_cutoff=3.0).eval()
        tasks = ["pbe", "r2scan"] if request.param == "tasks" else ["default"]
        options = {"per_species_shift": {task: [-1.0, -2.0, -3.0] for task in tasks}, "tasks": tasks}
        return EquivariantPotential(SPECIES, 3.5, num_layers=2, num_features=4, radial_hidden=[8], **options).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore")
def test_same_as_the_calculator(potential: torch.nn.Module, tmp_path: Path) -> None:
    reason = "metatomic is not installed; the extra 'test' has it"
    ase_calculator = pytest.importorskip("metatomic_ase", reason=reason)
    task = "r2scan" if len(potential.tasks) > 1 else None
    export_metatomic(potential, tmp_path / "model.pt", task=task)
    theirs = ase_calculator.MetatomicCalculator(str(tmp_path / "model.pt"))
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True) * (3, 2, 1)
    crystal.symbols[::3] = "O"
    crystal.rattle(0.1, seed=1)
    small = bulk("Cu", a=3.6)
    for atoms in (crystal, small, molecule("H2O"), Atoms("Cu"), crystal * (1, 1, 2)):
        other = atoms.copy()
        atoms.calc, other.calc = JanusPipeCalculator(potential, task=task), theirs
        assert other.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=0, abs=1e-10)
        np.testing.assert_allclose(other.get_forces(), atoms.get_forces(), rtol=0, atol=1e-10)
        if atoms.pbc.all():
            np.testing.assert_allclose(other.get_stress(), atoms.get_stress(), rtol=0, atol=1e-10)


def test_metatomic_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning_januspipe.deploy.metatomic_model", raising=False)
    monkeypatch.setitem(sys.modules, "metatomic.torch", None)
    with pytest.raises(ImportError, match="metatomic needs a package .*: pip install metatomic-torch"):
        export_metatomic(EquivariantPotential(SPECIES, 3.5, num_layers=1, num_features=2), tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
def test_energies_are_traced_for_other_sizes() -> None:
    """This much needs no metatomic."""
    from lightning_januspipe.calculator import StructureAdapter

    torch.manual_seed(0)
    potential = EquivariantPotential(SPECIES, 3.5, num_layers=2, num_features=4, radial_hidden=[8]).double().eval()
    energies, adapter = EnergiesOfAtoms(potential), StructureAdapter(SPECIES, 3.5)
    first, *others = (example_arguments(adapter, sizes, torch.float64, "cpu") for sizes in ([2], [3, 1], [1]))
    traced = torch.jit.trace(energies, tuple(first), check_trace=False)
    for example in others:
        torch.testing.assert_close(traced(*example), energies(*example), rtol=0, atol=1e-10)
    assert energies.num_messages() == 2


def test_energies_depend_on_atoms_within_the_reach(potential: torch.nn.Module) -> None:
    """The end of a chain of neighbours depends on as many more atoms as the reach has edges."""
    energies = EnergiesOfAtoms(potential)
    if energies.task is None and len(potential.tasks) > 1:
        energies.task = 0
    num = energies.num_messages() + 3
    positions = torch.zeros(num, 3, dtype=torch.float64)
    positions[:, 0] = 2.7 * torch.arange(num)
    positions[1::2, 1] = 0.5
    forward = torch.stack([torch.arange(num - 1), torch.arange(1, num)])
    edge_index = torch.cat([forward, forward.flip(0)], dim=1)
    zeros = torch.zeros(num, dtype=torch.int64)
    shifts, cell = edge_index.new_zeros(edge_index.shape[1], 3), torch.zeros(1, 3, 3, dtype=torch.float64)
    of_atoms = energies(positions.requires_grad_(), zeros + 2, edge_index, shifts.double(), cell, zeros)
    (derivative,) = torch.autograd.grad(of_atoms.flatten()[0], positions)
    (depends,) = torch.nonzero(derivative.norm(dim=1), as_tuple=True)
    assert depends.tolist() == list(range(energies.num_messages() + 1))
