"""Holds what the adapters of several packages share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.calculator.adapter import AtomsAdapter


class EnergyAtomsAdapter(AtomsAdapter):
    """Differentiates the energies of potentials that compute no derivatives by themselves.

    Its batches are mappings with the ``positions`` (N, 3) and the ``cell`` (3, 3) in Å.
    """

    def energies(self, potential: nn.Module, batch: Mapping[str, Any], positions: Tensor, cell: Tensor) -> Tensor:
        """Returns energies in eV whose sum is the energy: of the atoms (N,), or one of the structure.

        Args:
            potential: The potential.
            batch: The batch; its positions and its cell are not to be read.
            positions: (N, 3) positions in Å to differentiate by.
            cell: (3, 3) cell in Å to differentiate by; zeros without periodic directions.
        """
        raise NotImplementedError

    @override
    def call(self, potential: nn.Module, batch: Any) -> dict[str, Tensor]:
        cell = batch["cell"]
        positions = batch["positions"].detach().clone().requires_grad_(True)
        strain = torch.zeros_like(cell, requires_grad=True)
        deformation = torch.eye(3, dtype=cell.dtype, device=cell.device) + (strain + strain.T) / 2
        energies = self.energies(potential, batch, positions @ deformation, cell @ deformation).reshape(-1)
        energy = energies.sum() + 0 * (positions.sum() + strain.sum())  # a lone atom's depends on neither
        forces, virial = torch.autograd.grad([energy], [positions, strain])
        found = {"energy": energy, "forces": -forces}
        volume = torch.linalg.det(cell).abs()
        if bool(volume > 0):
            found["stress"] = virial / volume
        return found | ({"energies": energies} if self.of_atoms else {})

    of_atoms = False
    """Whether :meth:`energies` returns the energies of the atoms."""


def cell_of(atoms: Atoms, dtype: torch.dtype) -> Tensor:
    """Returns the cell (3, 3) in Å; zeros without periodic directions."""
    return torch.tensor(atoms.cell.array * bool(atoms.pbc.any()), dtype=dtype)


def symbols_of(numbers: Iterable[int]) -> list[str]:
    """Returns the chemical symbols of atomic numbers."""
    return [chemical_symbols[number] for number in numbers]


def embedded_symbols(model: nn.Module, hydrogen: int = 1) -> list[str]:
    """Returns the elements that a model's first embedding has, with a row for each atomic number.

    Args:
        model: The model.
        hydrogen: Row of hydrogen.
    """
    embedding = next(part for part in model.modules() if isinstance(part, nn.Embedding))
    return symbols_of(range(1, min(embedding.num_embeddings - hydrogen + 1, len(chemical_symbols))))


def charge_of(atoms: Atoms) -> float:
    """Returns the charge of a structure in elementary charges: ``Atoms.info["charge"]``, or 0."""
    return float(atoms.info.get(keys.CHARGE, 0))


@contextmanager
def double_for_float(dtype: torch.dtype) -> Iterator[None]:
    """Lets ``tensor.float()``, by which a package asks for single precision, return float64 inside the block.

    Args:
        dtype: Type of the computation; nothing is changed unless it is float64.
    """
    doubled = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with doubled if dtype == torch.float64 else nullcontext():
        yield
