"""Finds the neighbours of atoms in periodic, partly periodic and non-periodic structures.

A library does the search itself: vesin where it is installed, otherwise matscipy. This module prepares the cell so that
both return the same list for every kind of boundary, and sorts the result.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Atoms closer than this (Å) are one atom written twice: no potential has a finite force there.
_MIN_DISTANCE = 1e-6

# Up to this many atoms an estimate looks at all pairs.
_MAX_COUNTED = 256

# Atoms at a surface take up this much space (Å) beyond their centers.
_ATOM_SIZE = 2.0


def neighbor_list(
    positions: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    cutoff: float,
    *,
    backend: str = "auto",
) -> tuple[Ints, Ints]:
    """Finds all pairs of atoms closer than a cutoff, in both directions.

    An atom is a neighbour of its own periodic images, never of itself at shift zero. Atoms may lie outside the cell,
    and the cell may be smaller than the cutoff. The search is done in float64, and the edges are sorted by target, then
    source, then shift, so that the same structure has the same list everywhere.

    Args:
        positions: (N, 3) positions in Å.
        cell: (3, 3) cell vectors as rows in Å; rows of non-periodic directions are ignored and may be zero.
        pbc: (3,) whether each direction is periodic.
        cutoff: Largest distance in Å.
        backend: ``"vesin"``, ``"matscipy"``, or ``"auto"`` for the first of them that is installed.

    Returns:
        ``edge_index`` (2, E), row 0 the source j and row 1 the target i, and ``cell_shifts`` (E, 3), integers S with
        edge vector = r_j + S @ cell - r_i.

    Raises:
        ValueError: The cutoff is not positive and finite, an array has the wrong shape, a position or cell vector is
            not finite, the cell is singular in its periodic directions, two atoms coincide, or the backend is unknown.
        ImportError: No library for neighbour lists is installed.
    """
    points = np.ascontiguousarray(positions, dtype=np.float64)
    box = np.array(cell, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    _check_input(points, box, periodic, cutoff)
    search = {"vesin": _search_vesin, "matscipy": _search_matscipy}[_pick_backend(backend)]
    empty = np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64)
    if len(points) == 0 or (len(points) == 1 and not periodic.any()):
        return empty

    search_points, search_box = _complete_cell(points, box, periodic, cutoff)
    target, source, shifts = search(search_points, search_box, periodic, cutoff)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], source, target))
    edge_index = np.stack([source.take(order), target.take(order)]).astype(np.int64)
    cell_shifts = shifts.take(order, axis=0).astype(np.int64)

    vectors = points.take(edge_index[0], axis=0)
    vectors += cell_shifts.astype(np.float64) @ search_box
    vectors -= points.take(edge_index[1], axis=0)
    squares = np.einsum("ij,ij->i", vectors, vectors)
    if squares.size and squares.min() < _MIN_DISTANCE**2:
        j, i = edge_index[:, int(squares.argmin())]
        distance = squares.min() ** 0.5
        raise ValueError(
            f"atoms {min(i, j)} and {max(i, j)} are {distance:.1e} Å apart (with periodic images); expected distinct "
            "positions. Remove the duplicate atom or correct the cell."
        )
    return edge_index, cell_shifts


def estimate_num_edges(positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float) -> float:
    """Estimates how many edges :func:`neighbor_list` would find, in much less time.

    The number is exact for small structures that are not periodic. Otherwise the atoms are assumed to be spread evenly
    over the cell without its largest gaps, such as the vacuum beside a slab; atoms next to a gap have fewer neighbours.

    Args:
        positions: (N, 3) positions in Å.
        cell: (3, 3) cell vectors as rows in Å.
        pbc: (3,) whether each direction is periodic.
        cutoff: Largest distance in Å.
    """
    points = np.asarray(positions, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    num_atoms = len(points)
    if not periodic.any() and num_atoms <= _MAX_COUNTED:
        squares = ((points[:, None] - points[None]) ** 2).sum(-1)
        return float(np.count_nonzero(squares < cutoff**2) - num_atoms)
    origin_points, box = _complete_cell(points, np.array(cell, dtype=np.float64), periodic, cutoff)
    volume = abs(float(np.linalg.det(box)))
    fractions = origin_points @ np.linalg.inv(box)
    share_near_surfaces = 1.0
    filled = volume
    for axis in range(3):
        height = volume / float(np.linalg.norm(np.cross(box[axis - 2], box[axis - 1])))
        along = np.sort(fractions[:, axis] % 1.0 if periodic[axis] else fractions[:, axis])
        gap = float(np.diff(along, append=along[0] + 1.0).max()) * height
        if periodic[axis] and gap < cutoff:
            continue
        thickness = height - gap + _ATOM_SIZE
        filled *= thickness / height
        # The fraction of the atoms' cutoff spheres that is inside a slab, on average.
        ratio = thickness / cutoff
        share_near_surfaces *= 1 - 3 / (8 * ratio) if ratio > 1 else 5 * ratio / 8
    density = num_atoms / filled
    return num_atoms * max(density * 4 / 3 * np.pi * cutoff**3 * share_near_surfaces - 1, 0.0)


def _check_input(points: Floats, box: Floats, periodic: Bools, cutoff: float) -> None:
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"cutoff={cutoff!r} Å; expected a positive, finite number")
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"positions have shape {points.shape}; expected (N, 3)")
    if box.shape != (3, 3) or periodic.shape != (3,):
        raise ValueError(f"cell and pbc have shapes {box.shape} and {periodic.shape}; expected (3, 3) and (3,)")
    if not np.isfinite(points).all():
        raise ValueError(f"the position of atom {int(np.argwhere(~np.isfinite(points))[0, 0])} is NaN or infinite")
    if not np.isfinite(box).all():
        raise ValueError(f"the cell has NaN or infinite entries: {box.tolist()}")


def _pick_backend(backend: str) -> str:
    known = ("vesin", "matscipy")
    if backend in known:
        return backend
    if backend != "auto":
        raise ValueError(f"neighbour list backend {backend!r} is unknown; expected 'auto' or one of {known}")
    for name in known:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ImportError("neighbour lists need vesin or matscipy: pip install vesin")


def _complete_cell(points: Floats, box: Floats, periodic: Bools, cutoff: float) -> tuple[Floats, Floats]:
    """Replaces the non-periodic cell vectors by vectors normal to the others that enclose all atoms.

    The list does not depend on these vectors, along which all shifts are zero. But the libraries refuse a singular
    cell, and search for quadratic time if atoms lie outside the cell. Moving all positions together changes no pair.
    """
    from ase.geometry import complete_cell

    kept = box * periodic[:, None]
    lengths = np.linalg.norm(kept, axis=1)[periodic]
    if (lengths == 0).any():
        raise ValueError(
            f"pbc={periodic.tolist()} but the cell {box.tolist()} has a zero vector along a periodic direction; set "
            "the cell vector or turn pbc off there"
        )
    rank_tolerance = 1e-6
    if periodic.any() and np.linalg.matrix_rank(kept[periodic] / lengths[:, None], tol=rank_tolerance) < periodic.sum():
        raise ValueError(f"the cell vectors {box.tolist()} are linearly dependent; expected a cell with a volume")

    full = np.array(complete_cell(kept), dtype=np.float64)
    origin = np.zeros(3)
    for axis in np.flatnonzero(~periodic):
        normal = full[axis] / np.linalg.norm(full[axis])
        height = points @ normal
        full[axis] = normal * (np.ptp(height) + 2 * cutoff)
        origin += normal * (height.min() - cutoff)
    return points - origin, full


def _search_vesin(points: Floats, box: Floats, periodic: Bools, cutoff: float) -> tuple[Ints, Ints, Ints]:
    from vesin import NeighborList

    finder = NeighborList(cutoff=cutoff, full_list=True)
    i, j, shifts = finder.compute(points=points, box=box, periodic=periodic, quantities="ijS")
    return i, j, shifts.reshape(-1, 3)


def _search_matscipy(points: Floats, box: Floats, periodic: Bools, cutoff: float) -> tuple[Ints, Ints, Ints]:
    from matscipy.neighbours import neighbour_list

    i, j, shifts = neighbour_list("ijS", positions=points, cell=box, pbc=periodic, cutoff=float(cutoff))
    return i, j, shifts.reshape(-1, 3)
