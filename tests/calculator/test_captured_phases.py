"""Potentials of other packages are compiled as in training: by their captured phases, once for all structures."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.constraints import FixBondLengths
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from torch import nn

from lightning_januspipe.calculator import AtomsAdapter, JanusPipeCalculator
from lightning_januspipe.calculator import calculator as module
from lightning_januspipe.calculator.captured_phases import examples_of
from lightning_januspipe.testing.interpreted import interpreted_phases

PROPERTIES = ("energy", "forces", "stress", "energies")


class Pairs(nn.Module):
    """A potential of nobody's package: pairs and their densities, differentiated by positions and a strain."""

    def __init__(self) -> None:
        super().__init__()
        self.density = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
        self.mix = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, batch):
        positions = batch["positions"].detach().requires_grad_(True)
        strain = torch.zeros_like(batch["cell"], requires_grad=True)
        deformed = positions + positions @ strain
        offsets = batch["shifts"] @ (batch["cell"] + batch["cell"] @ strain)
        vectors = deformed[batch["j"]] + offsets - deformed[batch["i"]]
        distance = vectors.square().sum(dim=1).sqrt()
        inside = (1 - (distance / 4.0).square()).clamp(min=0).pow(3)
        edges = inside[:, None] * torch.exp(-self.density.abs() * distance[:, None])
        atoms = torch.zeros(positions.shape[0], 2, dtype=edges.dtype).index_add(0, batch["i"], edges)
        energies = torch.tanh(self.mix(atoms)).sum(dim=1)
        forces, virial = torch.autograd.grad(
            energies.sum(), [positions, strain], create_graph=self.training, materialize_grads=True
        )
        volume = torch.linalg.det(batch["cell"]).abs()
        return {"energy": energies.sum(), "forces": -forces, "stress": virial / volume, "energies": energies}


class PairsAdapter(AtomsAdapter):
    def batch_from_atoms(self, atoms, edges, dtype):
        j, i = torch.from_numpy(edges.edge_index)
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "cell": torch.tensor(atoms.cell.array, dtype=dtype),
            "shifts": torch.tensor(edges.cell_shifts, dtype=dtype),
            "i": i,
            "j": j,
        }


def structures() -> list[Atoms]:
    crystal = bulk("Cu", a=3.7, cubic=True) * (2, 2, 1)
    crystal.rattle(0.1, seed=0)
    return [crystal, molecule("CH3CH2OH"), bulk("Cu", a=3.6), Atoms("Cu"), crystal * (2, 1, 1)]


def calculator(**options) -> JanusPipeCalculator:
    torch.manual_seed(0)
    return JanusPipeCalculator(Pairs(), adapter=PairsAdapter(4.0), **options)


def assert_same(found: Atoms, expected: JanusPipeCalculator) -> None:
    other = found.copy()
    for name in PROPERTIES:
        if name != "stress" or other.cell.rank == 3:
            own, right = found.calc.get_property(name, found), expected.get_property(name, other)
            np.testing.assert_allclose(own, right, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("first", [0, 1])
def test_one_capture_serves_all_structures(first: int) -> None:
    """The first one may be periodic or not."""
    eager, compiled = calculator(), calculator(compile=True)
    with interpreted_phases() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error")
        for atoms in structures()[first:]:
            atoms.calc = compiled
            assert_same(atoms, eager)
        atoms = structures()[0]
        atoms.calc = compiled
        thermalize_momenta(atoms, temperature_K=2000, rng=np.random.default_rng(0))
        num_edges = set()
        for _ in range(5):
            VelocityVerlet(atoms, 4 * units.fs).run(1)
            assert_same(atoms, eager)
            num_edges.add(compiled.neighbors.edges(atoms).edge_index.shape[1])
    assert len(num_edges) > 1
    assert len(graphs) == 2, "FE and FF, once"
    (stage,) = compiled._compiled._pipeline.executor.stages.values()
    assert stage.num_misfits == 0


class Boundary(PairsAdapter):
    """Says of crystals which directions are periodic."""

    def batch_from_atoms(self, atoms, edges, dtype):
        batch = super().batch_from_atoms(atoms, edges, dtype)
        return batch | {"pbc": torch.tensor(atoms.pbc) if atoms.pbc.any() else None}


def test_batches_with_other_entries_are_evaluated_eagerly() -> None:
    """A molecule after a crystal, which was captured; the next crystal is not captured again."""
    crystal, ethanol, *_ = structures()
    potential = Pairs()
    eager, compiled = (JanusPipeCalculator(potential, adapter=Boundary(4.0), compile=c) for c in (False, True))
    with interpreted_phases() as graphs:
        for atoms in (crystal, ethanol, crystal):
            atoms.rattle(0.01, seed=1)
            atoms.calc = compiled
            assert_same(atoms, eager)
    assert len(graphs) == 2, "FE and FF, once"


def test_the_potential_stays_as_it_is() -> None:
    compiled = calculator(compile=True)
    with interpreted_phases():
        atoms = structures()[0]
        atoms.calc = compiled
        atoms.get_forces()
    assert not any(p.requires_grad for p in compiled.potential.parameters()) and not compiled.potential.training


def test_sizes_that_were_not_captured_are_evaluated_eagerly() -> None:
    """A forward that does something else for 40 atoms and more is captured with fewer."""

    class Limited(Pairs):
        def forward(self, batch):
            found = super().forward(batch)
            return found if batch["positions"].shape[0] < 40 else {**found, "energy": 2 * found["energy"]}

    potential = Limited()
    eager, compiled = (JanusPipeCalculator(potential, adapter=PairsAdapter(4.0), compile=c) for c in (False, True))
    with interpreted_phases() as graphs:
        for repeat in (1, 3, 1):
            atoms = structures()[0] * (repeat, 1, 1)
            atoms.rattle(0.01, seed=repeat)
            atoms.calc = compiled
            if repeat == 3:
                with pytest.warns(UserWarning, match="evaluates a structure eagerly, and others like it: .*captured"):
                    atoms.get_potential_energy()
            assert_same(atoms, eager)
    assert len(graphs) == 2, "FE and FF, once"


def test_copies_compile_again() -> None:
    """Structures go to other processes with their calculators."""
    with interpreted_phases() as graphs:
        atoms = structures()[0]
        atoms.calc = calculator(compile=True)
        forces = atoms.get_forces()
        other = pickle.loads(pickle.dumps(atoms))
        assert other.calc.results["energy"] == atoms.get_potential_energy() and len(graphs) == 2
        other.positions += 0.1
        np.testing.assert_allclose(other.get_forces(), forces, rtol=0, atol=1e-10)
    assert len(graphs) == 4


def test_constraints_that_cannot_be_repeated() -> None:
    """The structures that a potential is captured with have none."""
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.set_constraint(FixBondLengths([[0, 1]]))
    atoms.calc = calculator(compile=True)
    with interpreted_phases() as graphs:
        atoms.get_potential_energy()
    assert len(graphs) == 2 and atoms.constraints


def test_wrong_phases_are_not_used() -> None:
    def changed(graph):
        return lambda *given: [1.001 * value for value in graph(*given)]

    atoms = structures()[0]
    with interpreted_phases(changed):
        atoms.calc = calculator(compile=True)
        with pytest.raises(ValueError, match="compile=True, but Pairs cannot be compiled .*computes something else"):
            atoms.get_forces()


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(Pairs):
        def forward(self, batch):
            found = super().forward(batch)
            return found if float(found["energy"].detach()) < 1e9 else {}

    atoms = structures()[0]
    torch.manual_seed(0)
    atoms.calc = JanusPipeCalculator(Branching(), adapter=PairsAdapter(4.0), compile=True)
    with interpreted_phases(), pytest.raises(ValueError, match="compile=True, but Branching cannot be compiled"):
        atoms.get_forces()
    monkeypatch.setattr(module, "_SECONDS_BEFORE_COMPILING", 0.0)
    atoms.calc = JanusPipeCalculator(Branching(), adapter=PairsAdapter(4.0), compile="auto")
    with interpreted_phases(), pytest.warns(UserWarning, match="stays eager: Branching cannot be compiled"):
        atoms.get_forces()
    atoms.rattle(0.01)
    atoms.get_forces()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_examples_have_other_sizes_and_edges(index: int) -> None:
    atoms = structures()[index]
    small, large = examples_of(atoms)
    assert 4 <= len(small) < len(large) and set(large.numbers) == set(atoms.numbers)
    counts = [module.SkinNeighborList(4.0, 0.0).edges(one).edge_index.shape[1] for one in (small, large)]
    assert 0 < counts[0] < counts[1]
    assert all((one.pbc == atoms.pbc).all() for one in (small, large))
