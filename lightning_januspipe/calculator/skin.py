"""Keeps a neighbour list that is longer than the cutoff, and uses it again while atoms and cell change little."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell

from lightning_januspipe.data.neighbors import Floats, Ints, neighbor_list


class Edges(NamedTuple):
    """Holds the E edges of a structure.

    Attributes:
        edge_index: (2, E), row 0 the source j and row 1 the target i.
        cell_shifts: (E, 3) integers S; the edge vector is r_j + S @ cell - r_i.
        vectors: (E, 3) edge vectors in Å.
    """

    edge_index: Ints
    cell_shifts: Ints
    vectors: Floats


class SkinNeighborList:
    """Gives the edges of structures that change from call to call, such as those of a trajectory.

    The edges are those of :func:`~lightning_januspipe.data.neighbor_list`, in the same order. The search is done with
    a longer cutoff, and only when a pair of atoms that the search did not see may have come closer than the cutoff.
    With F the map from the cell of the search to the present one, and u = r - r_search F the other movement of the
    atoms, a pair that was apart by d is still apart by at least σ_min(F) d - 2 max|u|. So a deformation of the cell
    that moves the atoms with it needs no new search until it makes up for the skin.

    Args:
        cutoff: Largest distance of an edge in Å.
        skin: How much longer the search reaches, in Å; 0 searches at every call.

    Attributes:
        num_searches: Number of searches so far.

    Raises:
        ValueError: The skin is negative or not finite.
    """

    def __init__(self, cutoff: float, skin: float = 1.0) -> None:
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(f"skin={skin!r} Å; expected a finite number, at least 0")
        self.cutoff, self.skin = float(cutoff), float(skin)
        self.num_searches = 0
        self._searched: tuple[Floats, Floats, np.ndarray] | None = None
        self._found: tuple[Ints, Ints] | None = None
        self._offsets: tuple[Floats, Floats] | None = None  # a cell, and what it adds to the vectors

    def edges(self, atoms: Atoms) -> Edges:
        """Returns the edges of a structure.

        Raises:
            ValueError: There is no neighbour list; see :func:`~lightning_januspipe.data.neighbor_list`.
        """
        positions, cell, pbc = np.array(atoms.positions, float), np.array(atoms.cell, float), np.array(atoms.pbc)
        if not self._is_valid(positions, cell, pbc):
            self._searched = self._offsets = None  # an error in the search leaves nothing behind
            self._found = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
            self._searched = positions, cell, pbc
            self.num_searches += 1
        assert self._found is not None
        edge_index, shifts = self._found
        # Shifts along directions that are not periodic are zero, so what the cell has there does not count.
        if self._offsets is None or not np.array_equal(cell, self._offsets[0]):
            self._offsets = cell, shifts @ cell
        source, target = edge_index
        vectors = positions.take(source, axis=0)
        vectors += self._offsets[1]
        vectors -= positions.take(target, axis=0)
        near = np.flatnonzero(np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2)
        return Edges(edge_index.take(near, axis=1), shifts.take(near, axis=0), vectors.take(near, axis=0))

    def _is_valid(self, positions: Floats, cell: Floats, pbc: np.ndarray) -> bool:
        """Returns whether no pair that the last search did not find can be closer than the cutoff."""
        if self._searched is None or not self.skin:
            return False
        before, cell_before, pbc_before = self._searched
        if before.shape != positions.shape or not np.array_equal(pbc, pbc_before):
            return False
        if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
            return False  # the search raises the error
        deformation = np.eye(3)
        if pbc.any() and not np.array_equal(cell, cell_before):
            old, new = (np.array(complete_cell(box * pbc[:, None])) for box in (cell_before, cell))
            deformation = np.linalg.solve(old, new)
        moved = positions - before @ deformation
        moved -= moved.mean(axis=0)  # a movement of all atoms together changes no distance
        largest = float(np.linalg.norm(moved, axis=1).max(initial=0.0))
        least = float(np.linalg.svd(deformation, compute_uv=False)[-1])
        return least * (self.cutoff + self.skin) - 2 * largest >= self.cutoff
