"""Compiled evaluations give what the potential gives, along trajectories, without being compiled again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.calculator import calculator as module
from lightning_januspipe.models import EquivariantPotential, PotentialModule

from .conftest import crystal


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What inductor was asked to compile in a test, by this package or by anything else in torch."""
    found: list[str] = []
    compile_fx = inductor.compile_fx
    monkeypatch.setattr(
        inductor, "compile_fx", lambda *given, **more: found.append("graph") or compile_fx(*given, **more)
    )
    counters.clear()
    return found


def looked_up() -> int:
    """Returns how many graphs torch has looked up in its cache since the test began, found or not."""
    return sum(counters["aot_autograd"][f"autograd_cache_{outcome}"] for outcome in ("hit", "miss", "bypass"))


def hot(repeat: int = 2) -> Atoms:
    atoms = bulk("Cu", a=3.6, cubic=True) * repeat
    atoms.symbols[::5] = "Al"
    thermalize_momenta(atoms, temperature_K=900, rng=np.random.default_rng(0))
    return atoms


class Both:
    """Compares each evaluation of a compiled calculator with that of an eager one."""

    def __init__(self, trained: nn.Module, atoms: Atoms, **options) -> None:
        self.atoms, self.eager = atoms, JanusPipeCalculator(trained, compile=False)
        atoms.calc = JanusPipeCalculator(trained, compile=True, **options)
        self.num_edges: set[int] = set()

    def __call__(self) -> None:
        other = self.atoms.copy()
        other.calc = self.eager
        assert self.atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), rel=0, abs=1e-10)
        np.testing.assert_allclose(self.atoms.get_forces(), other.get_forces(), rtol=0, atol=1e-10)
        if self.atoms.pbc.any():
            np.testing.assert_allclose(self.atoms.get_stress(), other.get_stress(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(self.atoms.get_potential_energies(), other.get_potential_energies(), atol=1e-10)
        self.num_edges.add(self.eager.neighbors.edges(other).edge_index.shape[1])


def compared_in_dynamics(potential: nn.Module, atoms: Atoms) -> Both:
    """Runs 20 steps of dynamics, each with both calculators; the compiled one stays with the atoms."""
    both = Both(potential, atoms)
    both()
    dynamics = Langevin(atoms, 2 * units.fs, temperature_K=900, friction=0.02 / units.fs, rng=np.random.default_rng(1))
    dynamics.attach(both)
    dynamics.run(20)
    return both


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes ten times as long on a busy machine
def test_one_compilation_serves_all_structures(trained: PotentialModule, compilations: list[str]) -> None:
    atoms = hot()
    both = compared_in_dynamics(trained, atoms)
    barostat = IsotropicMTKNPT(
        atoms, timestep=2 * units.fs, temperature_K=900, pressure_au=0.0, tdamp=100 * units.fs, pdamp=1000 * units.fs
    )
    barostat.attach(both)
    barostat.run(10)
    assert len(both.num_edges) > 2
    relaxing = BFGS(FrechetCellFilter(atoms), logfile=None)
    relaxing.attach(both)
    relaxing.run(fmax=0.01, steps=5)
    shared = atoms.calc
    for other in (crystal(1), bulk("Cu", a=3.7), Atoms("AlCu", [[0, 0, 0], [0, 0, 2.5]]), Atoms("Cu"), crystal(2)):
        other.calc = shared
        alone = other.copy()
        alone.calc = JanusPipeCalculator(trained)
        np.testing.assert_allclose(other.get_forces(), alone.get_forces(), rtol=0, atol=1e-10)
        assert other.get_potential_energy() == pytest.approx(alone.get_potential_energy(), rel=0, abs=1e-10)
    assert compilations == ["graph"] and looked_up() == 1
    assert not counters["frames"], "dynamo, which compiles again for other sizes, has no part in it"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes ten times as long on a busy machine
def test_auto_compiles_after_some_time(
    trained: PotentialModule, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms, alone = crystal(2), crystal(2)
    atoms.calc, alone.calc = JanusPipeCalculator(trained), JanusPipeCalculator(trained, compile=False)
    for step in range(5):
        assert len(compilations) == (step > 2)
        if step == 2:
            monkeypatch.setattr(module, "_SECONDS_BEFORE_COMPILING", atoms.calc._eager_seconds)
        for one in (atoms, alone):
            one.positions += 0.01
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), rtol=0, atol=1e-10)
        if step == 1:
            assert not compilations
            atoms.get_forces()  # the same structure is no evaluation
    assert len(compilations) == looked_up() == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_layers(compilations: list[str]) -> None:
    torch.manual_seed(0)
    potential = EquivariantPotential(["Al", "Cu"], 4.0, num_layers=3, num_features=4, radial_hidden=[8]).double()
    atoms = hot()
    both = compared_in_dynamics(potential, atoms)
    assert len(both.num_edges) > 1 and compilations == ["graph"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_compilation_serves_all_tasks(compilations: list[str]) -> None:
    torch.manual_seed(0)
    shifts = {"pbe": -1.0, "r2scan": -2.0}
    options = {"num_layers": 1, "num_features": 4, "per_species_shift": {name: [e, e] for name, e in shifts.items()}}
    potential = EquivariantPotential(["Al", "Cu"], 4.0, tasks=list(shifts), **options).double()
    calculators = [JanusPipeCalculator(potential, compile=compile) for compile in (True, False)]
    for index, task in enumerate(["pbe", "r2scan", "pbe"]):
        found = []
        for calculator in calculators:
            atoms = crystal(index)
            atoms.info["task"] = task
            atoms.calc = calculator
            found.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
        for compiled, eager in zip(*found, strict=True):
            np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-10)
    assert compilations == ["graph"]


class Branching(EquivariantPotential):
    """A potential whose forward depends on a value, which no trace can follow."""

    def forward(self, batch):
        found = super().forward(batch)
        return found if float(found["energy"].sum()) < 1e9 else {}


@pytest.fixture
def branching() -> Branching:
    torch.manual_seed(0)
    return Branching(["Al", "Cu"], 4.0, num_layers=1, num_features=4).double()


def test_what_cannot_be_compiled(branching: Branching, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, alone = crystal(1), crystal(1)
    alone.calc = JanusPipeCalculator(branching)
    atoms.calc = JanusPipeCalculator(branching, compile=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"compile=True, but Branching cannot be compiled \(.*Use compile=F"):
            atoms.get_forces()
    monkeypatch.setattr(module, "_SECONDS_BEFORE_COMPILING", 1e-9)
    atoms.calc = JanusPipeCalculator(branching)
    atoms.get_forces()
    for one in (atoms, alone):
        one.positions[0] += 0.1
    with pytest.warns(UserWarning, match="JanusPipeCalculator stays eager: Branching cannot be compiled"):
        np.testing.assert_array_equal(atoms.get_forces(), alone.get_forces())
    atoms.positions[0] += 0.1
    atoms.get_forces()  # without another warning


class Uncompiled:
    """Stands for compiled code, with an error in the forces in eV/Å."""

    error = 0.0

    def __init__(self, potential: nn.Module, *_: object) -> None:
        self.potential = potential

    def misfit(self, batch: object) -> None:
        return None

    def __call__(self, batch: object) -> dict[str, Tensor]:
        return {n: x.detach() + self.error * (n == "forces") for n, x in self.potential(batch).items()}


@pytest.mark.parametrize("compile", ["auto", True])
def test_compiling_is_told_once(branching: Branching, monkeypatch: pytest.MonkeyPatch, compile: Any) -> None:
    told: list[str] = []
    monkeypatch.setattr(module, "rank_zero_info", told.append)
    monkeypatch.setattr(module, "CompiledPotential", Uncompiled)
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(branching, compile=compile)
    if compile == "auto":
        atoms.get_forces()
        assert told == []
        atoms.calc._eager_seconds = 61.4
    for _ in range(2):
        atoms.positions[0] += 0.1
        atoms.get_forces()
    assert told == [
        f"JanusPipeCalculator compiles Branching{' after 61 s of evaluations' if compile == 'auto' else ''}, once, "
        "which may take some minutes",
        "JanusPipeCalculator has compiled Branching in 0 s",
    ]


def test_code_that_gives_other_results_is_not_used(branching: Branching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uncompiled, "error", 1e-6)
    monkeypatch.setattr(module, "CompiledPotential", Uncompiled)
    atoms = crystal(1)
    atoms.calc = JanusPipeCalculator(branching, compile=True)
    with pytest.raises(ValueError, match=r"compile=True, but its forces result differs by 1.00e-06 from that"):
        atoms.get_forces()


def test_errors(branching: Branching, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compile='yes'; expected True, False or 'auto'"):
        JanusPipeCalculator(branching, compile="yes")
    monkeypatch.setattr(module, "missing_compiler", lambda device: f"there is no compiler for {device}")
    with pytest.raises(ValueError, match="compile=True, but there is no compiler for cpu"):
        JanusPipeCalculator(branching, compile=True, device="cpu")
