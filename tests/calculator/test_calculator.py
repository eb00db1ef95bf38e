from __future__ import annotations

import copy
import doctest
import importlib

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc100, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from torch import nn
from torch.utils.data import DataLoader

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.calculator import AtomsAdapter, JanusPipeCalculator
from lightning_januspipe.data import atoms_to_sample
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.testing import quiet_trainer

from .conftest import crystal


def slab() -> Atoms:
    atoms = fcc100("Cu", (2, 1, 2), a=3.7, vacuum=4.0)
    atoms.symbols[0] = "Al"
    atoms.rattle(0.1, seed=1)
    return atoms


def cluster() -> Atoms:
    atoms = (bulk("Cu", a=3.6, cubic=True) * 2)[:7]
    atoms.symbols[3] = "Al"
    atoms.rattle(0.1, seed=2)
    return Atoms(atoms.symbols, atoms.positions)


def tiny() -> Atoms:
    """A cell of one atom, smaller than the cutoff, with an atom outside of it."""
    atoms = bulk("Cu", a=3.7)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * np.arange(9).reshape(3, 3) / 9))
    atoms.positions += 4.0
    return atoms


STRUCTURES = {"crystal": lambda: crystal(5), "slab": slab, "cluster": cluster, "tiny": tiny}


@pytest.fixture(params=STRUCTURES)
def atoms(request) -> Atoms:
    return STRUCTURES[request.param]()


def test_results_are_those_of_the_module(trained: PotentialModule, atoms: Atoms) -> None:
    batch = atoms_to_sample(atoms, species=["Al", "Cu"], cutoff=4.0, dtype="float64", require_labels=False)
    expected = {name: value.detach().numpy() for name, value in trained(batch).items()}
    atoms.calc = JanusPipeCalculator(trained)
    for _ in range(2):
        assert atoms.get_potential_energy() == pytest.approx(expected["energy"][0], rel=0, abs=1e-10)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"], rtol=0, atol=1e-10)
        assert atoms.get_potential_energies().sum() == pytest.approx(expected["energy"][0], rel=0, abs=1e-10)
        if atoms.pbc.any():
            np.testing.assert_allclose(atoms.get_stress(voigt=False), expected["stress"][0], rtol=0, atol=1e-10)
        else:
            with pytest.raises(PropertyNotImplementedError):
                atoms.get_stress()
        atoms.positions += 1e-3  # the second round uses the same neighbour list
    assert atoms.calc.neighbors.num_searches == 1


def test_forces_and_stress_are_derivatives_of_the_energy(trained: PotentialModule, atoms: Atoms) -> None:
    atoms.calc = JanusPipeCalculator(trained)
    forces = atoms.get_forces()
    assert np.abs(forces).max() > 0.01 or len(atoms) == 1
    np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-4), rtol=0, atol=1e-5)
    if atoms.pbc.all():
        expected = calculate_numerical_stress(atoms, eps=1e-5)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(atoms.get_stress(), expected, rtol=0, atol=1e-7)


def test_repeated_cells_have_as_much_more_energy(trained: PotentialModule) -> None:
    small = crystal(4)
    large = small * (2, 1, 3)
    for atoms in (small, large):
        atoms.calc = JanusPipeCalculator(trained)
    assert large.get_potential_energy() == pytest.approx(6 * small.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(large.get_forces(), np.tile(small.get_forces(), (6, 1)), rtol=0, atol=1e-10)
    np.testing.assert_allclose(large.get_stress(), small.get_stress(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", [None, [20.0, 20.0, 20.0]])
def test_a_lone_atom_has_an_energy_and_no_forces(trained: PotentialModule, cell) -> None:
    atom = Atoms("Cu", cell=cell, pbc=cell is not None, calculator=JanusPipeCalculator(trained))
    assert np.isfinite(atom.get_potential_energy())
    np.testing.assert_array_equal(atom.get_forces(), np.zeros((1, 3)))


def test_one_calculator_serves_one_structure_after_the_other(trained: PotentialModule) -> None:
    shared = JanusPipeCalculator(trained)
    for _ in range(2):
        for make in STRUCTURES.values():
            atoms, alone = make(), make()
            atoms.calc, alone.calc = shared, JanusPipeCalculator(trained)
            np.testing.assert_array_equal(atoms.get_forces(), alone.get_forces())


def test_energy_is_conserved_in_molecular_dynamics(trained: PotentialModule) -> None:
    """The list is used again in nearly all steps, and the total energy drifts by less than 0.1 meV/atom in 100 fs."""
    atoms = bulk("Cu", a=3.6, cubic=True) * 2
    atoms.calc = JanusPipeCalculator(trained, skin=0.6)
    rng = np.random.default_rng(0)
    atoms.set_momenta(np.sqrt(atoms.get_masses() * units.kB * 1200)[:, None] * rng.normal(size=(len(atoms), 3)))
    Stationary(atoms)
    energies, kinetic = [], []
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy() / len(atoms)))
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy() / len(atoms)))
    dynamics.run(100)
    assert np.ptp(kinetic) > 0.03
    assert abs(np.mean(energies[-20:]) - np.mean(energies[:20])) < 1e-4
    assert 1 < atoms.calc.neighbors.num_searches < 20


def test_a_cell_relaxes_to_the_lattice_of_the_labels(trained: PotentialModule) -> None:
    atoms = bulk("Cu", a=3.75, cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.calc = JanusPipeCalculator(trained)
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.005, steps=50)
    assert atoms.cell.lengths() == pytest.approx([3.59] * 3, abs=0.03)  # EMT's lattice constant
    assert np.abs(atoms.get_stress()).max() < 1e-3
    assert atoms.calc.neighbors.num_searches <= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_is_enough(trained: PotentialModule, tmp_path, kind: str) -> None:
    strategy = JanusPipeStrategy(save_distributed_checkpoint=True) if kind == "folder" else "auto"
    trainer = quiet_trainer(strategy, default_root_dir=tmp_path)
    sample = atoms_to_sample(crystal(0), species=["Al", "Cu"], cutoff=4.0, dtype="float64", require_labels=False)
    trainer.validate(copy.deepcopy(trained), DataLoader([sample], batch_size=None), verbose=False)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(trained)
    expected = atoms.get_forces()
    atoms.calc = JanusPipeCalculator(str(tmp_path / "trained.ckpt"))
    np.testing.assert_allclose(atoms.get_forces(), expected, rtol=0, atol=1e-12)


def test_types(trained: PotentialModule) -> None:
    """The module stays as it is; far from the origin a float32 potential has the digits that it has there."""
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    atoms = crystal(3)
    atoms.calc = JanusPipeCalculator(trained)
    expected = atoms.get_forces()
    atoms.calc = JanusPipeCalculator(trained, dtype="float32")
    assert {p.dtype for p in atoms.calc.potential.parameters()} == {torch.float32}
    near = np.abs(atoms.get_forces() - expected).max()
    assert 0 < near < 1e-4
    cells = np.random.default_rng(0).integers(-3000, 3000, (len(atoms), 3))
    atoms.positions += cells @ atoms.cell.array
    assert np.abs(atoms.positions).max() > 5000
    assert np.abs(atoms.get_forces() - expected).max() < 1e-4
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    assert all(p.requires_grad for p in trained.parameters())


class OtherPotential(nn.Module):
    """A potential of another package, with batches and outputs of its own: Morse pairs in kcal/mol."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor(8.0))

    def forward(self, graph):
        positions = graph["pos"].requires_grad_(True)
        lengths = (positions[graph["j"]] + graph["offsets"] - positions[graph["i"]]).norm(dim=-1)
        pairs = self.depth * ((1 - torch.exp(-1.4 * (lengths - 2.6))).square() - 1) * (1 - lengths / 4.0).square()
        node_energy = torch.zeros(len(positions), dtype=pairs.dtype).index_add(0, graph["i"], pairs / 2)
        (gradient,) = torch.autograd.grad(node_energy.sum(), positions)
        return node_energy, gradient


class OtherAdapter(AtomsAdapter):
    def batch_from_atoms(self, atoms, edges, dtype):
        j, i = torch.from_numpy(edges.edge_index)
        offsets = torch.tensor(edges.cell_shifts @ atoms.cell.array, dtype=dtype)
        return {"pos": torch.tensor(atoms.positions, dtype=dtype), "i": i, "j": j, "offsets": offsets}

    def results(self, potential, batch, output):
        node_energy, gradient = output
        unit = units.kcal / units.mol
        return {"energy": node_energy.sum() * unit, "forces": -gradient * unit, "energies": node_energy * unit}


def test_potentials_of_other_packages_have_adapters() -> None:
    potential = OtherPotential().double()
    for atoms in (crystal(2), cluster()):
        atoms.calc = JanusPipeCalculator(potential, adapter=OtherAdapter(4.0))
        forces = atoms.get_forces()
        assert np.abs(forces).max() > 1e-3
        np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-4), rtol=0, atol=1e-6)
        assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()


def test_errors(trained: PotentialModule, tmp_path) -> None:
    water = molecule("H2O")
    water.calc = JanusPipeCalculator(trained)
    with pytest.raises(
        ValueError, match=r"unknown species H, O; known: \['Al', 'Cu'\]. The potential was made and trained"
    ):
        water.get_potential_energy()
    with pytest.raises(ValueError, match=r"OtherPotential has no attributes 'species' and 'cutoff'.*adapter="):
        JanusPipeCalculator(OtherPotential())
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        JanusPipeCalculator(tmp_path / "missing.ckpt")
    with pytest.raises(ValueError, match="dtype='float16'; expected 'float32', 'float64'"):
        JanusPipeCalculator(trained, dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda', but torch finds no GPU"):
            JanusPipeCalculator(trained, device="cuda")
    atoms = crystal(2)
    atoms.calc = JanusPipeCalculator(OtherPotential(), adapter=AtomsAdapter(4.0))
    with pytest.raises(NotImplementedError):
        atoms.get_potential_energy()
    with pytest.raises(TypeError, match="returned tuple; expected a mapping"):
        AtomsAdapter(4.0).results(trained, {}, (1, 2))
    with pytest.raises(ValueError, match=r"cutoff=0 Å; expected a positive"):
        AtomsAdapter(0)


@pytest.mark.parametrize("module", ["calculator", "adapter", "skin"])
def test_examples(module: str) -> None:
    found = importlib.import_module(f"lightning_januspipe.calculator.{module}")
    assert doctest.testmod(found, optionflags=doctest.ELLIPSIS).failed == 0
