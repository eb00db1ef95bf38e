"""Chooses the graph rank that owns each atom of a micro-batch: equal work for all ranks, and few rows to exchange.

An edge belongs to the owner of its target. So a rank's work grows with the edges into its atoms, and its halo, the rows
that it reads from other ranks, holds the sources of these edges. Whole structures are dealt to the ranks if the work is
then balanced, because nothing is exchanged between them. Otherwise several cheap partitions with equal work are tried,
and the one with the smallest halo is taken. The halo is counted from the edges, which cross periodic boundaries without
the cell.

All ranks compute the same owners from the same numbers; nothing is random.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from itertools import combinations_with_replacement, permutations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe.loader.packing import ATOM_WEIGHT, deal

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Order = Literal["spatial", "index"]

MAX_IMBALANCE = 1.05
"""Largest ratio of the largest to the mean work with which whole structures are dealt."""


def partition_atoms(
    edge_target: Tensor,
    edge_source: Tensor,
    num_atoms: int,
    num_ranks: int,
    positions: Tensor | None = None,
    *,
    structure: Tensor | None = None,
    cell: Tensor | None = None,
    order: Order = "spatial",
) -> Tensor:
    """Gives each atom to a rank.

    The work of every rank differs from the mean by at most the work of one atom; if whole structures are dealt, it is
    at most ``MAX_IMBALANCE`` times the mean.

    Args:
        edge_target: (E,) the atom that each edge is summed into.
        edge_source: (E,) the atom whose features each edge reads.
        num_atoms: N.
        num_ranks: G; ranks may stay empty.
        positions: (N, 3), in any unit.
        structure: (N,) index of each atom's structure; found from the edges if not given.
        cell: (3, 3), or (B, 3, 3) together with ``structure``; rows are cell vectors. With it, positions that have
            drifted into other periodic images are folded back, which makes the halo smaller. Structures with a singular
            cell are not folded.
        order: "spatial" for the smallest halo, or "index" for consecutive atoms, whatever their structures.

    Returns:
        (N,) the owner of each atom, on the CPU.

    Raises:
        ValueError: sizes that do not fit together, an atom that does not exist, an unknown order.
    """
    if order not in ("spatial", "index"):
        raise ValueError(f"order={order!r}; expected 'spatial' or 'index'")
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}; expected a positive number")
    target, source = (_checked_atoms(t, num_atoms) for t in (edge_target, edge_source))
    if len(target) != len(source):
        raise ValueError(f"{len(target)} targets and {len(source)} sources of edges; expected equal numbers")
    weight = ATOM_WEIGHT + np.bincount(target, minlength=num_atoms).astype(np.float64)
    if num_ranks == 1 or num_atoms == 0:
        return torch.zeros(num_atoms, dtype=torch.int64)
    if order == "index":
        return torch.from_numpy(_cut(np.arange(num_atoms), weight, num_ranks))
    label = _structures(target, source, num_atoms, structure)
    rank_of_structure, position_in_deal = _deal(np.bincount(label, weight).astype(np.float64), num_ranks)
    owner = rank_of_structure[label]
    loads = np.bincount(owner, weight, minlength=num_ranks)
    if len(rank_of_structure) >= num_ranks and loads.max() * num_ranks <= MAX_IMBALANCE * loads.sum():
        return torch.from_numpy(owner)
    points = None if positions is None else _checked_positions(positions, num_atoms)
    if points is not None and cell is not None:
        points = _folded(points, cell.detach().to("cpu", torch.float64).numpy(), structure)
    best, fewest = None, -1
    for candidate in _candidates(target, source, weight, position_in_deal[label], points, num_ranks):
        num = _count_halo(candidate, target, source, num_ranks)
        if best is None or num < fewest:
            best, fewest = candidate, num
    assert best is not None
    return torch.from_numpy(best)


def halo_size(owner: Tensor, edge_target: Tensor, edge_source: Tensor, num_ranks: int) -> int:
    """Returns the number of rows that one exchange of atom features sends, summed over the ranks.

    Args:
        owner: (N,) the rank that owns each atom.
        edge_target: (E,) the target of each edge.
        edge_source: (E,) the source of each edge.
        num_ranks: G.
    """
    ranks, target, source = (t.detach().to("cpu", torch.int64).numpy() for t in (owner, edge_target, edge_source))
    return _count_halo(ranks, target, source, num_ranks)


def _candidates(
    target: Ints, source: Ints, weight: Floats, structure: Ints, points: Floats | None, num_ranks: int
) -> Iterator[Ints]:
    """Yields different partitions; each goes through the structures one by one, so that few of them are cut."""
    num_atoms = len(weight)
    yield _cut(np.lexsort((np.arange(num_atoms), structure)), weight, num_ranks)
    yield _cut(np.arange(num_atoms), weight, num_ranks)
    if points is not None:
        is_one = structure.max() == 0
        for axis in range(3):
            slabs = np.lexsort((points[:, axis], structure))
            for quarter in range(4 if is_one else 1):
                # A first slab that begins inside the cell, so that atoms just outside of the cell lie in one slab.
                yield _cut(np.roll(slabs, quarter * num_atoms // (4 * num_ranks)), weight, num_ranks)
        if is_one:
            for numbers in _factors(num_ranks):
                # Reversed, equal numbers of parts give the same blocks up to a few atoms.
                for axes in permutations(range(3), len(numbers)):
                    if numbers != numbers[::-1] or axes[0] <= axes[-1]:
                        yield _nested(points, weight, numbers, axes)
            yield _bisected(points, weight, num_ranks)
    found = _cuthill_mckee(target, source, num_atoms)
    if found is not None:
        yield _cut(found[np.argsort(structure[found], kind="stable")], weight, num_ranks)


def _cut(order: Ints, weight: Floats, num_ranks: int) -> Ints:
    """Cuts an order of atoms into parts of equal work, each within the work of one atom of the mean."""
    ordered = weight[order]
    middles = np.cumsum(ordered) - ordered / 2
    owner = np.empty(len(order), dtype=np.int64)
    owner[order] = np.minimum(middles * (num_ranks / ordered.sum()), num_ranks - 1).astype(np.int64)
    return owner


def _nested(points: Floats, weight: Floats, numbers: tuple[int, ...], axes: tuple[int, ...]) -> Ints:
    """Returns slabs along one axis, each cut into bars along the next axis, and so on."""
    owner = np.zeros(len(weight), dtype=np.int64)
    for number, axis in zip(numbers, axes, strict=True):
        parts = owner * number
        for part in range(int(owner.max()) + 1):
            inside = np.flatnonzero(owner == part)
            if len(inside):
                parts[inside] += _cut(np.argsort(points[inside, axis], kind="stable"), weight[inside], number)
        owner = parts
    return owner


def _bisected(points: Floats, weight: Floats, num_ranks: int) -> Ints:
    """Returns a recursive coordinate bisection, always across the longest extent."""
    owner = np.zeros(len(weight), dtype=np.int64)
    stack = [(np.arange(len(weight)), 0, num_ranks)]
    while stack:
        inside, first, number = stack.pop()
        if number == 1 or not len(inside):
            owner[inside] = first
            continue
        axis = int(np.ptp(points[inside], axis=0).argmax())
        # Cut into as many parts as there are ranks, so that the halves of an odd number get their shares.
        upper = _cut(np.argsort(points[inside, axis], kind="stable"), weight[inside], number) >= number // 2
        stack.append((inside[~upper], first, number // 2))
        stack.append((inside[upper], first + number // 2, number - number // 2))
    return owner


def _folded(points: Floats, cell: Floats, structure: Tensor | None) -> Floats:
    """Returns positions along the cell vectors, folded into the cell."""
    if cell.ndim == 3 and len(cell) == 1:
        cell = cell[0]
    if cell.shape[-2:] != (3, 3) or cell.ndim not in (2, 3) or (cell.ndim == 3 and structure is None):
        raise ValueError(f"cell has shape {cell.shape}; expected (3, 3), or (B, 3, 3) together with structure")
    cells = cell[None] if cell.ndim == 2 else cell
    lengths = np.linalg.norm(cells, axis=-1)
    is_periodic = np.abs(np.linalg.det(cells)) > 1e-6 * lengths.prod(-1)
    inverses = np.linalg.inv(np.where(is_periodic[:, None, None], cells, np.eye(3)))
    index = np.zeros(len(points), np.int64)
    if cell.ndim == 3 and structure is not None:
        index = structure.detach().to("cpu", torch.int64).numpy()
    fractions = np.einsum("na,nab->nb", points, inverses[index])
    return np.where(is_periodic[index, None], (fractions - np.floor(fractions)) * lengths[index], points)


def _factors(number: int) -> list[tuple[int, ...]]:
    """Returns the most even product of two factors greater than one, and of three, if there are any."""
    found: list[tuple[int, ...]] = []
    for length in (2, 3):
        all_of = [f for f in combinations_with_replacement(range(2, number), length) if math.prod(f) == number]
        found += sorted(all_of, key=lambda f: f[-1] / f[0])[:1]
    return found


def _cuthill_mckee(target: Ints, source: Ints, num_atoms: int) -> Ints | None:
    """Returns an order in which neighbouring atoms are near each other, from the edges alone; None without scipy."""
    if importlib.util.find_spec("scipy") is None or not len(target):
        return None
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    return reverse_cuthill_mckee(_adjacency(target, source, num_atoms), symmetric_mode=False).astype(np.int64)


def _structures(target: Ints, source: Ints, num_atoms: int, structure: Tensor | None) -> Ints:
    """Returns (N,) the structure of each atom, 0, 1, ... in order of appearance: as given, or as connected."""
    if structure is not None:
        given = structure.detach().cpu().numpy()
        if given.shape != (num_atoms,):
            raise ValueError(f"structure has shape {given.shape}; expected ({num_atoms},)")
        label = given
    elif importlib.util.find_spec("scipy") is not None:
        from scipy.sparse.csgraph import connected_components

        _, label = connected_components(_adjacency(target, source, num_atoms), directed=False)
    else:
        label = _connected(target, source, num_atoms)
    _, first, number = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)


def _connected(target: Ints, source: Ints, num_atoms: int) -> Ints:
    """Returns the smallest atom connected with each atom: labels spread along edges, and jump to labels of labels."""
    label = np.arange(num_atoms)
    while True:
        spread = label.copy()
        least = np.minimum(label[target], label[source])
        np.minimum.at(spread, label[target], least)
        np.minimum.at(spread, label[source], least)
        spread = spread[spread]
        if np.array_equal(spread, label):
            return label
        label = spread


def _adjacency(target: Ints, source: Ints, num_atoms: int) -> Any:
    from scipy.sparse import coo_matrix

    ones = np.ones(len(target), dtype=np.int8)
    return coo_matrix((ones, (target, source)), shape=(num_atoms, num_atoms)).tocsr()


def _deal(work: Floats, num_ranks: int) -> tuple[Ints, Ints]:
    """Deals whole structures, the largest first, each to the rank with the least work so far.

    Args:
        work: (B,) the work of each structure.
        num_ranks: G.

    Returns:
        (B,) the rank of each structure, and (B,) its place when structures are sorted by rank.
    """
    rank_of = np.empty(len(work), dtype=np.int64)
    for rank, structures in enumerate(deal(work.tolist(), num_ranks)):
        rank_of[[structure for _, structure in structures]] = rank
    position = np.empty_like(rank_of)
    position[np.argsort(rank_of, kind="stable")] = np.arange(len(work))
    return rank_of, position


def _count_halo(owner: Ints, target: Ints, source: Ints, num_ranks: int) -> int:
    reader = owner[target]
    crosses = reader != owner[source]
    is_read = np.zeros(num_ranks * len(owner), dtype=np.bool_)
    is_read[reader[crosses] * len(owner) + source[crosses]] = True
    return int(np.count_nonzero(is_read))


def _checked_atoms(index: Tensor, num_atoms: int) -> Ints:
    atoms = index.detach().to("cpu", torch.int64).numpy()
    if atoms.ndim != 1 or (len(atoms) and not 0 <= atoms.min() <= atoms.max() < num_atoms):
        found = f"of shape {atoms.shape}" if atoms.ndim != 1 else f"from {atoms.min()} to {atoms.max()}"
        raise ValueError(f"atoms of edges are {found}; expected an index below {num_atoms} for each edge")
    return atoms


def _checked_positions(positions: Tensor, num_atoms: int) -> Floats:
    points = positions.detach().to("cpu", torch.float64).numpy()
    if points.shape != (num_atoms, 3):
        raise ValueError(f"positions have shape {points.shape}; expected ({num_atoms}, 3)")
    return points
