"""Turns structures into the batches that a potential takes, and its outputs into the results that ASE knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell
from torch import Tensor, nn

from lightning_januspipe import keys
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index
from lightning_januspipe.data.tasks import read_task

TRAINED = (
    "The potential was made and trained for these species, and cannot be given others: train one with all of them."
)


class AtomsAdapter:
    """Makes the batches of one kind of potential; a subclass overrides :meth:`batch_from_atoms`.

    Args:
        cutoff: Cutoff of the neighbour list in Å.

    Example:
        A potential that takes atomic numbers, positions and edge vectors::

            class MyAdapter(AtomsAdapter):
                def batch_from_atoms(self, atoms, edges, dtype):
                    return {
                        "numbers": torch.tensor(atoms.numbers),
                        "positions": torch.tensor(atoms.positions, dtype=dtype),
                        "pairs": torch.tensor(edges.edge_index),
                        "offsets": torch.tensor(edges.cell_shifts @ atoms.cell.array, dtype=dtype),
                    }


            atoms.calc = JanusPipeCalculator(my_potential, adapter=MyAdapter(cutoff=5.0))
    """

    def __init__(self, cutoff: float) -> None:
        if not (np.isfinite(cutoff) and cutoff > 0):
            raise ValueError(f"cutoff={cutoff!r} Å; expected a positive, finite number")
        self.cutoff = float(cutoff)

    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        """Returns the batch of one structure, on the CPU.

        Args:
            atoms: Structure of N atoms, which have been moved near the origin: see :func:`near_origin`.
            edges: Its neighbour list.
            dtype: Type of floating-point tensors.
        """
        raise NotImplementedError

    def call(self, potential: nn.Module, batch: Any) -> Any:
        """Calls the potential, with further arguments where it needs some."""
        return potential(batch)

    def results(self, potential: nn.Module, batch: Any, output: Any) -> dict[str, Tensor]:
        """Returns the results of one structure in eV, eV/Å and eV/Å³, as far as the potential has them.

        Args:
            potential: The potential that was called.
            batch: What it was called with.
            output: What it returned; by default a mapping with the names of the results.

        Returns:
            ``energy`` of one element, and where known ``forces`` (N, 3), ``stress`` (3, 3), positive under tension,
            and ``energies`` of the atoms (N,).

        Raises:
            TypeError: The output is no mapping.
        """
        if not isinstance(output, Mapping):
            raise TypeError(
                f"the potential returned {type(output).__name__}; expected a mapping with 'energy', 'forces' and "
                "'stress'. Override AtomsAdapter.results to find them in it"
            )
        names = ("energy", "forces", "stress", "energies")
        return {name: output[name] for name in names if isinstance(output.get(name), Tensor)}

    def energies_of_atoms(self, potential: nn.Module, batch: Any) -> Tensor | None:
        """Returns the energies (N,) of the atoms in eV, where they take a computation of their own; None otherwise."""
        return None


class StructureAdapter(AtomsAdapter):
    """Makes the batches of :mod:`lightning_januspipe.keys`, which the potentials of this package take.

    Args:
        species: Chemical symbols in the order of the potential.
        cutoff: Cutoff of the neighbour list in Å.
        tasks: Names of the tasks that the potential was trained on, if it tells tasks apart: ``Atoms.info`` then has
            the name of the ``task``, which may be missing where there is one task, ``charge`` and ``spin``.
        task: Name of the task of all structures, whatever ``Atoms.info`` says; None for their own.

    Raises:
        ValueError: ``task`` is none of the tasks.
    """

    def __init__(
        self, species: Sequence[str], cutoff: float, tasks: Sequence[str] = (), task: str | None = None
    ) -> None:
        super().__init__(cutoff)
        self.species, self.tasks = list(species), list(tasks)
        if task is not None and task not in self.tasks:
            known = f"has the tasks {self.tasks}" if self.tasks else "was trained without tasks: leave it out"
            raise ValueError(f"task={task!r}, but the potential {known}")
        self._asked = {} if task is None else {keys.TASK: task}

    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the batch of one structure.

        Raises:
            ValueError: An element is not among the species, or the task is not known.
        """
        pbc = np.array(atoms.pbc, dtype=bool)
        cell = np.array(atoms.cell, dtype=np.float64) if pbc.any() else np.zeros((3, 3))
        return {
            keys.POSITIONS: torch.tensor(atoms.positions, dtype=dtype),
            keys.SPECIES: torch.from_numpy(species_index(atoms, self.species, "the structure", TRAINED)),
            keys.ATOMIC_NUMBERS: torch.tensor(atoms.numbers, dtype=torch.int64),
            keys.EDGE_INDEX: torch.from_numpy(edges.edge_index),
            keys.CELL_SHIFTS: torch.tensor(edges.cell_shifts, dtype=dtype),
            keys.CELL: torch.tensor(cell, dtype=dtype).unsqueeze(0),
            keys.BATCH: torch.zeros(len(atoms), dtype=torch.int64),
            keys.PBC: torch.tensor(pbc).unsqueeze(0),
            **(read_task(atoms.info | self._asked, self.tasks, "the structure") if self.tasks else {}),
        }

    def energies_of_atoms(self, potential: nn.Module, batch: dict[str, Tensor]) -> Tensor | None:
        """Returns the energies (N,) of the atoms in eV, whose sum is the energy."""
        model = getattr(potential, "energy_model", None)
        if model is None or not hasattr(model, "atomic_energies"):
            return None
        return model.atomic_energies(batch, batch[keys.POSITIONS], torch.zeros_like(batch[keys.CELL]))


def near_origin(atoms: Atoms, edges: Edges) -> tuple[Atoms, Edges]:
    """Returns a structure with its atoms in the cell, around the origin, and the same edges.

    Atoms that have moved far in a long trajectory would have fewer digits in float32.

    Args:
        atoms: Structure, which stays as it is.
        edges: Its neighbour list.

    Raises:
        ValueError: There are no atoms.
    """
    if len(atoms) == 0:
        raise ValueError("the structure has no atoms; expected at least one")
    periodic = atoms.pbc[:, None]
    box = np.array(complete_cell(atoms.cell.array * periodic))
    cells = np.floor(np.linalg.solve(box.T, atoms.positions.T).T).astype(np.int64) * atoms.pbc
    moved, source, target = atoms.copy(), *edges.edge_index
    moved.set_constraint()
    moved.positions -= cells @ box
    moved.positions -= moved.positions.mean(axis=0)
    if not cells.any():
        return moved, edges
    return moved, edges._replace(
        cell_shifts=edges.cell_shifts + cells.take(source, axis=0) - cells.take(target, axis=0)
    )
