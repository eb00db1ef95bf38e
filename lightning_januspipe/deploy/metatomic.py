"""Exports a trained potential as a model of metatomic, which LAMMPS, i-PI, PLUMED, TorchSim and ASE run.

The energies of atoms are traced by TorchScript, which leaves the numbers of atoms and edges open, and metatomic's
engines differentiate them. The model calls metatomic and metatensor: neither this package nor Lightning is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from lightning_januspipe import keys
from lightning_januspipe.calculator import StructureAdapter
from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.compiled.compiled_potential import TOLERANCES
from lightning_januspipe.deploy.standalone import converted, example_arguments, file_to_write, potential_of


def export_metatomic(
    model: str | Path | nn.Module,
    path: str | Path,
    *,
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    task: str | None = None,
) -> None:
    """Writes a potential as a model of metatomic with the output ``energy``, and compares it with the potential.

    Args:
        model: A checkpoint of a :class:`~lightning_januspipe.models.PotentialModule` with a potential of this package,
            such a module, or such a potential.
        path: The file to write, ending in ``.pt``; it is replaced if it exists.
        dtype: The type that the potential is converted to; None for the type of its weights.
        task: The task that the file is for, where the potential has several.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ImportError: ``metatomic-torch`` is not installed.
        ValueError: The path does not end in ``.pt``, is a folder or the checkpoint, or cannot be written, the potential
            has no energies of atoms, ``task`` is none of its tasks, or the traced energies differ from those of the
            potential.
    """
    try:
        from lightning_januspipe.deploy.metatomic_model import saved
    except ModuleNotFoundError as error:
        raise ImportError(f"metatomic needs a package ({error}): pip install metatomic-torch") from error
    path = file_to_write(path, ".pt", "models of metatomic are files whose", model)
    potential, species, cutoff = potential_of(model, task)
    floats = converted(potential, dtype)
    energies = EnergiesOfAtoms(potential)
    adapter = StructureAdapter(species, cutoff)
    examples = [example_arguments(adapter, sizes, floats, "cpu") for sizes in ([3], [2], [1])]
    traced = torch.jit.trace(energies, tuple(examples[0]), check_trace=False)
    for example in examples[1:]:
        expected = energies(*example)
        difference = float((traced(*example) - expected).abs().max())
        if not difference <= TOLERANCES[floats] * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"{type(potential).__name__} cannot be traced for all sizes: energies differ by {difference:.2e} eV"
            )
    reach = cutoff * energies.num_messages()
    numbers = [atomic_numbers[symbol] for symbol in species]
    with atomic.replacing(path) as target:
        saved(traced, numbers, cutoff, reach, floats, target)


class EnergiesOfAtoms(nn.Module):
    """Gives the energies of atoms of a conservative potential as a function of tensors.

    Args:
        potential: The potential, or one of several tasks with the one that is meant.

    Raises:
        ValueError: The potential has no energies of atoms.
    """

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.task: int | None = getattr(potential, "task", None)
        inner: Any = getattr(potential, "potential", potential)
        self.energy_model: Any = getattr(inner, "energy_model", None)
        if not hasattr(self.energy_model, "atomic_energies"):
            raise ValueError(f"{type(inner).__name__} has no energies of atoms, which metatomic needs")

    def forward(
        self, positions: Tensor, species: Tensor, edge_index: Tensor, cell_shifts: Tensor, cell: Tensor, batch: Tensor
    ) -> Tensor:
        """Returns the energies (N,) in eV; shapes are those of :mod:`lightning_januspipe.keys`."""
        given = {
            keys.SPECIES: species,
            keys.EDGE_INDEX: edge_index,
            keys.CELL_SHIFTS: cell_shifts,
            keys.CELL: cell,
            keys.BATCH: batch,
        }
        if self.task is not None:
            given[keys.TASK] = torch.full_like(cell[:, 0, 0], self.task, dtype=torch.int64)
        found: Tensor = self.energy_model.atomic_energies(given, positions, torch.zeros_like(cell))
        return found

    def num_messages(self) -> int:
        """Returns the most edges between an atom and another one that its energy depends on.

        A block of MatRIS passes on what it knows twice: to the other arm of an angle, and along an edge to an atom.
        """
        model = self.energy_model
        return len(model.layers) if hasattr(model, "layers") else 2 * len(model.blocks)
