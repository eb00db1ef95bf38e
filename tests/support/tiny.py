"""A small float64 potential and data that every process builds alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def module(num_layers: int = 4, stress_weight: float = 1.0, **arguments: Any) -> Any:
    """A seeded PotentialModule with energy, force and stress losses."""
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    potential = EquivariantPotential(["Cu", "Ni", "Al"], 5.0, num_layers=num_layers, num_features=8, l_max=1)
    return PotentialModule(potential, stress_weight=stress_weight, **arguments)


def data(num_train: int = 20, batch_size: int = 8) -> Any:
    """EMT structures of unequal sizes; the last batch of an epoch is smaller."""
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
    """A module with trainable radial basis, scale and shift."""
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    potential = EquivariantPotential(
        ["Cu", "Ni", "Al"],
        5.0,
        num_layers=3,
        num_features=8,
        l_max=1,
        trainable_bessel=True,
        trainable_scale_shift=True,
    )
    return PotentialModule(potential, stress_weight=1.0)


def huber_module() -> Any:
    """Huber instead of squared errors."""
    return module(loss="huber")


def shared_data(name: str) -> Path:
    """A file of real DFT data beside the repository."""
    return Path(__file__).resolve().parents[3] / "shared" / "data" / name


def require(name: str) -> None:
    """Skip a test whose data file is absent."""
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
    """Periodic boxes of 64 molecules."""
    return _extxyz("water.extxyz", 6, 2)


def ethanol() -> Any:
    """Single molecules, not periodic."""
    return _extxyz("ethanol.extxyz", 20, 8)


def _molecular_module(species: list[str], num_layers: int) -> Any:
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    potential = EquivariantPotential(species, 4.0, num_layers=num_layers, num_features=8, l_max=1)
    return PotentialModule(potential)


def water_module() -> Any:
    """For water."""
    return _molecular_module(["H", "O"], 4)


def ethanol_module() -> Any:
    """For ethanol."""
    return _molecular_module(["H", "C", "O"], 3)
