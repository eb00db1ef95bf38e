"""A small float64 potential and data that every process builds alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {"num_layers": 1, "num_features": 4, "l_max": 1, "radial_hidden": [8]}


def module(num_layers: int = 4, stress_weight: float = 1.0, **arguments: Any) -> Any:
    """Returns a seeded PotentialModule with energy, force and stress losses."""
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    potential = EquivariantPotential(["Cu", "Ni", "Al"], 5.0, num_layers=num_layers, num_features=8, l_max=1)
    return PotentialModule(potential, stress_weight=stress_weight, **arguments)


def data(num_train: int = 20, batch_size: int = 8) -> Any:
    """Returns data of EMT structures of unequal sizes; the last batch of an epoch is smaller."""
    from lightning_januspipe.data import EMTDataModule

    return EMTDataModule(
        num_train=num_train,
        num_val=4,
        num_test=4,
        sizes=(4, 8, 16),
        dtype="float64",
        batch_size=batch_size,
        shuffle=False,
    )


def shared_module() -> Any:
    """Returns a module with trainable radial basis, scale and shift."""
    return _module_of(l_max=1, trainable_bessel=True)


def tasks_module() -> Any:
    """Returns a module with two tasks, each with trainable energies of atoms of its own."""
    return _module_of(per_species_shift={"emt": [-1.0, -2.0, -3.0], "morse": 0.5}, tasks=["emt", "morse"])


def _module_of(**arguments: Any) -> Any:
    """Returns a module of three layers with trainable scale and shift, and arguments of the potential."""
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_features": 8, "trainable_scale_shift": True}
    potential = EquivariantPotential(["Cu", "Ni", "Al"], 5.0, **(sizes | arguments))
    return PotentialModule(potential, stress_weight=1.0)


def small_tasks_module() -> Any:
    """Returns a small module with two tasks, which is traced in seconds: degrees up to 2 make much larger graphs."""
    return _module_of(per_species_shift={"emt": [-1.0, -2.0, -3.0], "morse": 0.5}, tasks=["emt", "morse"], **SMALL)


def tasks_data() -> Any:
    """Returns structures that EMT and a pair potential label in turns."""
    from lightning_januspipe.data import EMTDataModule

    options = {"dtype": "float64", "batch_size": 8, "shuffle": False}
    return EMTDataModule(num_train=20, num_val=4, num_test=4, sizes=(4, 8, 16), tasks=["emt", "morse"], **options)


def huber_module() -> Any:
    """Returns a module with Huber instead of squared errors."""
    return module(loss="huber")


def shared_data(name: str) -> Path:
    """Returns a file of real DFT data beside the repository."""
    return Path(__file__).resolve().parents[3] / "shared" / "data" / name


def require(name: str) -> None:
    """Skips a test whose data file is absent."""
    if not shared_data(name).exists():
        pytest.skip(f"{name} is not beside the repository")


def _extxyz(name: str, num_train: int, batch_size: int) -> Any:
    from lightning_januspipe.data import ASEDataModule

    return ASEDataModule(
        shared_data(name),
        train_size=num_train,
        val_size=2,
        test_size=2,
        cutoff=4.0,
        dtype="float64",
        batch_size=batch_size,
        shuffle=False,
    )


def water() -> Any:
    """Returns data of periodic boxes of 64 molecules."""
    return _extxyz("water.extxyz", 6, 2)


def ethanol() -> Any:
    """Returns data of single molecules, not periodic."""
    return _extxyz("ethanol.extxyz", 20, 8)


def _molecular_module(species: list[str], num_layers: int) -> Any:
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    potential = EquivariantPotential(species, 4.0, num_layers=num_layers, num_features=8, l_max=1)
    return PotentialModule(potential)


def water_module() -> Any:
    """Returns a module for water."""
    return _molecular_module(["H", "O"], 4)


def ethanol_module() -> Any:
    """Returns a module for ethanol."""
    return _molecular_module(["H", "C", "O"], 3)


class OddStructures:
    """A slab with vacuum, a wire, lone atoms, a pair, a cell of one atom, and a cluster; two batches of four."""

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        import numpy as np
        from ase import Atoms
        from ase.build import bulk, fcc111
        from ase.calculators.emt import EMT

        from lightning_januspipe.data import StructureDataset, collate_structures

        rng = np.random.default_rng(0)
        wire = bulk("Cu", "fcc", a=3.7, cubic=True) * (1, 1, 2)
        wire.pbc = (False, False, True)
        cluster = (bulk("Ni", "fcc", a=3.6, cubic=True) * (2, 2, 1))[:11]
        structures = [
            fcc111("Cu", (2, 2, 3), vacuum=9.0),
            Atoms("Al", [[0.0, 0.0, 0.0]]),
            bulk("Ni", "fcc", a=3.6),
            Atoms("CuNi", [[0.0, 0.0, 0.0], [2.3, 0.2, 0.1]]),
            wire,
            Atoms(cluster.numbers, cluster.positions),
            Atoms("Cu", [[1.0, 2.0, 3.0]]),
            bulk("Al", "fcc", a=4.0, cubic=True),
        ]
        for atoms in structures:
            atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
            atoms.calc = EMT()
            atoms.get_potential_energy()
            atoms.get_forces()
        dataset = StructureDataset(structures, cutoff=5.0, species=["Cu", "Ni", "Al"], dtype=torch.float64)
        return torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate_structures)
