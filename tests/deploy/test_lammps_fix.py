"""LAMMPS moves atoms by the forces of the calculator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lammps_workers as workers
import numpy as np
import pytest
from ase import units

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.deploy.lammps_fix import LammpsPotential
from lightning_januspipe.models import EquivariantPotential

lammps = pytest.importorskip("lammps")


@pytest.fixture
def potential() -> EquivariantPotential:
    return workers.potential()


@pytest.fixture
def run(tmp_path):
    """An instance of LAMMPS with a crystal of copper and aluminium in a box that is not orthogonal."""
    try:
        instance = workers.crystal(tmp_path)
    except OSError as error:
        pytest.skip(f"LAMMPS does not load here: {error}")
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


@pytest.mark.slow
@pytest.mark.parametrize("graph_size", [1, 2])
def test_several_mpi_processes(potential, run, tmp_path, graph_size: int) -> None:
    """Two processes give what one does: whole structures in each of them, or their atoms shared."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if mpiexec is None:
        pytest.skip("mpiexec was not found: pip install mpich")
    folder = tmp_path / "two"
    folder.mkdir()
    command = [mpiexec, "-n", "2", sys.executable, workers.__file__, str(folder), str(graph_size)]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    fix = LammpsPotential(run, potential, ["Cu", "Al"])
    expected = workers.trajectory(run, fix)
    of_ranks = [np.load(folder / f"{rank}.npz") for rank in range(2)]
    assert [int(one["num_local"]) > 0 for one in of_ranks] == [True, True]
    assert sum(int(one["num_local"]) for one in of_ranks) == len(fix.atoms())
    for one in of_ranks:
        for name, value in expected.items():
            if name != "num_local":
                np.testing.assert_allclose(one[name], value, rtol=1e-9, atol=1e-6, err_msg=name)


def test_ids_with_gaps_are_refused(potential, run) -> None:
    run.command("group first id 1")
    run.command("delete_atoms group first compress no")
    with pytest.raises(Exception, match="Atom-IDs must exist and be consecutive"):
        LammpsPotential(run, potential, ["Cu", "Al"])


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
