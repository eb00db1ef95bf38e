"""What has to hold for the calculator of any package's potential, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from calculator_ranks import adapter_of
from factories import factory
from torch import Tensor, nn

import lightning_januspipe
from lightning_januspipe.calculator import AtomsAdapter, JanusPipeCalculator
from lightning_januspipe.testing.interpreted import interpreted_phases

try:
    import lightning
except ModuleNotFoundError:
    import pytorch_lightning as lightning

Own = Callable[[Atoms], Mapping[str, Any]]
"""From a structure to the package's own energy in eV, forces in eV/Å and, of crystals, stress in eV/Å³."""


def crystal() -> Atoms:
    """Returns a strained, rattled cell of four atoms."""
    atoms = bulk("Cu", a=3.75, cubic=True)
    atoms.symbols[:2] = ["Al", "Ni"]
    strain = 0.02 * np.random.default_rng(0).standard_normal((3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
    atoms.rattle(0.08, seed=1)
    return atoms


def tiny() -> Atoms:
    """Returns a cell of one atom, smaller than the cutoff, with the atom outside of it."""
    atoms = bulk("Cu", a=3.7)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * np.arange(9).reshape(3, 3) / 9))
    atoms.positions += 4.0
    return atoms


def cluster() -> Atoms:
    """Returns five atoms without a cell."""
    atoms = (bulk("Cu", a=3.7, cubic=True) * 2)[:5]
    atoms.symbols[:2] = ["Al", "Ni"]
    atoms.rattle(0.1, seed=2)
    return Atoms(atoms.symbols, atoms.positions)


def larger_cluster() -> Atoms:
    """Returns nine atoms without a cell."""
    atoms = (bulk("Cu", a=3.7, cubic=True) * 2)[:9]
    atoms.symbols[:3] = ["Al", "Ni", "Al"]
    atoms.rattle(0.1, seed=3)
    return Atoms(atoms.symbols, atoms.positions)


def box() -> Atoms:
    """Returns 32 atoms in a triangular cell of more than 8 Å."""
    atoms = bulk("Cu", a=4.1, cubic=True) * 2
    atoms.symbols[:9] = ["Al", "Ni", "Al"] * 3
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.tril(np.full((3, 3), 0.02))), scale_atoms=True)
    atoms.rattle(0.08, seed=4)
    return atoms


def boxed(atoms: Atoms) -> Atoms:
    """Returns a structure that is periodic: a molecule is put into a large cell, for packages that take no others."""
    return atoms if atoms.pbc.all() else Atoms(atoms.symbols, atoms.positions, cell=[50.0] * 3, pbc=True)


def results_of(calculator: Calculator) -> Own:
    """Returns what evaluates a structure by a calculator of ASE."""

    def own(atoms: Atoms) -> dict[str, Any]:
        atoms.calc = calculator
        found = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        return found | ({"stress": atoms.get_stress(voigt=False)} if atoms.pbc.all() else {})

    return own


def check_calculator(
    module: nn.Module,
    own: Own,
    unknown: str | None = "U",
    structures: Sequence[Callable[[], Atoms]] = (crystal, tiny, cluster),
    stress: bool = True,
    repeated: float = 1e-12,
    lone: bool = True,
    adapter: AtomsAdapter | None = None,
    compiles: bool = False,
    most_misfits: int = 1,
) -> None:
    """Compares a calculator with the package's own numbers, with finite differences, and with itself.

    Args:
        module: The module that was trained.
        own: Evaluates a structure as the package does.
        unknown: An element that the potential does not have; None if it has all.
        structures: Make the structures to compare; without a periodic one, all are molecules.
        stress: The potential has a stress.
        lone: The potential has an energy of a lone atom.
        repeated: How much the energy of a repeated crystal may differ, relatively.
        adapter: Makes the batches of potentials that have no adapter of themselves.
        compiles: Whether the potential is known to compile, which is checked too.
        most_misfits: See :func:`check_compiled`.
    """
    shared, compiled = (JanusPipeCalculator(module, adapter=adapter, compile=c) for c in (False, True))
    assert "float64" in str(shared.dtype)
    periodic = any(make().pbc.all() for make in structures)
    for make in structures:
        atoms = make()
        atoms.calc = shared
        for step in range(2):
            expected = own(atoms.copy())
            energy = float(np.asarray(expected["energy"]).reshape(()))
            assert atoms.get_potential_energy() == pytest.approx(energy, rel=0, abs=1e-10), make.__name__
            np.testing.assert_allclose(atoms.get_forces(), expected["forces"], rtol=0, atol=1e-10)
            if stress and atoms.pbc.all():
                np.testing.assert_allclose(atoms.get_stress(voigt=False), expected["stress"], rtol=0, atol=1e-10)
            if not step:
                atoms.rattle(0.02, seed=3)
        forces = atoms.get_forces()
        np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-4), rtol=0, atol=1e-5)
        assert np.abs(forces).max() > 1e-3 or len(atoms) == 1
        if stress and atoms.pbc.all():
            np.testing.assert_allclose(
                atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), rtol=0, atol=1e-7
            )
        if make is crystal:
            large = atoms * (2, 1, 3)
            large.calc = shared
            assert large.get_potential_energy() == pytest.approx(6 * atoms.get_potential_energy(), rel=repeated)
            np.testing.assert_allclose(large.get_forces(), np.tile(forces, (6, 1)), rtol=0, atol=max(repeated, 1e-10))
    for atom in () if not lone else (Atoms("Cu"), *([Atoms("Cu", cell=[20.0] * 3, pbc=True)] if periodic else [])):
        atom.calc = shared
        assert np.isfinite(atom.get_potential_energy())
        np.testing.assert_array_equal(atom.get_forces(), np.zeros((1, 3)))
    if unknown is not None:
        stranger = Atoms([unknown, unknown], [[0, 0, 0], [0, 0, 2.0]], cell=[9.0] * 3, pbc=periodic)
        stranger.calc = shared
        with pytest.raises(ValueError, match=f"unknown species {unknown}"):
            stranger.get_potential_energy()
    if compiles:
        check_compiled(shared, compiled, structures, most_misfits)


def check_compiled(
    eager: JanusPipeCalculator,
    compiled: JanusPipeCalculator,
    structures: Sequence[Callable[[], Atoms]],
    most_misfits: int,
) -> None:
    """Compares compiled evaluations, whose graphs are interpreted here, with eager ones, along changing structures.

    Args:
        eager: The calculator.
        compiled: The same, with ``compile=True``.
        structures: Make the structures, of which three versions are evaluated; with fewer than two edges, eagerly.
        most_misfits: How many evaluations may be eager because the phases are not right for their sizes.
    """
    num_edges = set()
    with interpreted_phases() as graphs:
        for make in structures:
            atoms = make()
            atoms.calc = compiled
            for step in range(3):
                other = atoms.copy()
                other.calc = eager
                assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), rel=0, abs=1e-10)
                np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), rtol=0, atol=1e-10)
                for name in ("stress", "energies"):
                    assert (name in compiled.results) == (name in eager.results), name
                    if name in eager.results:
                        np.testing.assert_allclose(compiled.results[name], eager.results[name], rtol=0, atol=1e-10)
                num_edges.add(compiled.neighbors.edges(atoms).edge_index.shape[1])
                atoms.rattle(0.1, seed=step)
    assert len(graphs) == 2, "FE and FF are compiled once"
    assert len(num_edges) > 1, "numbers of edges change"
    (stage,) = compiled._compiled._pipeline.executor.stages.values()
    assert stage.num_misfits <= most_misfits, stage.misfit


class Checkpointed(lightning.LightningModule):
    """A module of another package whose checkpoint holds what makes it again: a program of this folder, by name.

    Args:
        program: File in the folder ``programs``.
        function: Name of the function that makes the module.
    """

    def __init__(self, program: str, function: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.made = factory(program, function)()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.made.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.made.configure_optimizers()


def check_checkpoint(program: str, function: str, data: str, folder: Path) -> None:
    """Trains a step, and compares a calculator of the checkpoint with one of the module that was trained.

    Args:
        program: File in the folder ``programs``.
        function: Name of the function that makes the module.
        data: Name of the function that makes its data.
        folder: Folder for the checkpoint.
    """

    def energy(module: Any) -> float:
        atoms = crystal()
        atoms.calc = JanusPipeCalculator(module, adapter=adapter_of(program, module.made.model))
        return float(atoms.get_potential_energy())

    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False, **options)
    module = Checkpointed(program, function)
    untrained = energy(module)
    trainer.fit(module, factory(program, data)())
    trainer.save_checkpoint(folder / "one.ckpt")
    loaded = lightning_januspipe.load(folder / "one.ckpt", Checkpointed)
    found, trained = energy(loaded), energy(module)
    assert found == pytest.approx(trained, rel=0, abs=1e-10)
    assert abs(trained - untrained) > 1e-7


def check_single_precision(module: nn.Module, monkeypatch: pytest.MonkeyPatch, adapter: Any = None) -> None:
    """Compares a calculator in float32 with one in float64, without what lets programs run in double precision."""
    found = []
    for dtype in ("float64", "float32"):
        atoms = crystal()
        if dtype == "float32" and "float" in vars(torch.Tensor):
            monkeypatch.delattr(torch.Tensor, "float")
        atoms.calc = JanusPipeCalculator(module, adapter=adapter, dtype=dtype)
        found.append([np.array(atoms.get_potential_energy()), atoms.get_forces()])
    for double, single in zip(*found, strict=True):
        difference, scale = np.abs(double - single).max(), np.abs(double).max()
        assert 0 < difference < 1e-5 * max(1.0, scale)
