"""Finds the undirected edges of a structure, and the angles between short edges: the nodes and edges of a line graph.

All is done with operations on whole tensors, so that a forward that calls it can be captured: the lists become inputs
that are made once for each micro-batch, outside of the stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LineGraph:
    """Joins E directed edges, U undirected edges and A angles.

    Attributes:
        undirected: (E,) the undirected edge of each directed one.
        directed: (U,) one of the two directed edges of each undirected one.
        edge: (A,) the directed edge that is one arm of each angle.
        other: (A,) the directed edge that is the other arm; both arms end at the same atom.
    """

    undirected: Tensor
    directed: Tensor
    edge: Tensor
    other: Tensor


def line_graph(edge_index: Tensor, cell_shifts: Tensor, is_near: Tensor, num_atoms: int) -> LineGraph:
    """Makes the line graph of a batch.

    An edge whose opposite is missing, as where rounding puts only one of the two below the cutoff, is an undirected
    edge by itself. Each pair of arms is two angles, one for each order.

    Args:
        edge_index: (2, E) source and target of each directed edge, in any order.
        cell_shifts: (E, 3) integers S; the edge vector is r_source + S @ cell - r_target.
        is_near: (E,) whether an edge may be the arm of an angle.
        num_atoms: N.
    """
    source, target = edge_index.unbind(0)
    undirected, directed = _undirected(source, target, cell_shifts.round().long(), num_atoms)
    edge, other = _angles(target, is_near, num_atoms)
    return LineGraph(undirected, directed, edge, other)


def _undirected(source: Tensor, target: Tensor, shifts: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Returns for each directed edge its undirected one, and for each undirected edge its first directed one."""
    x, y, z = shifts.unbind(1)
    # The opposite edge has the same two atoms and the opposite shift; the edge to a periodic image has one atom twice.
    sign = torch.where(source == target, _first_sign(x, y, z), torch.where(source < target, 1, -1))
    reach = torch.cat([shifts.abs().flatten(), shifts.new_ones(1)]).amax()
    key = torch.minimum(source, target) * num_atoms + torch.maximum(source, target)
    for component in (x, y, z):
        key = key * (2 * reach + 1) + component * sign + reach
    order = key.argsort(stable=True)
    sorted_keys, place = key[order], torch.arange(source.shape[0], device=source.device)
    is_first = (sorted_keys != sorted_keys.roll(1)) | (place == 0)
    undirected = torch.zeros_like(source).scatter(0, order, is_first.long().cumsum(0) - 1)
    return undirected, order[is_first.nonzero().squeeze(1)]


def _first_sign(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Returns the sign of the first component that is not zero."""
    return torch.where(x != 0, x.sign(), torch.where(y != 0, y.sign(), z.sign()))


def _angles(target: Tensor, is_near: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Returns all ordered pairs of near edges with the same target."""
    near = is_near.nonzero().squeeze(1)
    near = near[target[near].argsort(stable=True)]
    atom = target[near]
    counts = torch.zeros(num_atoms, dtype=torch.int64, device=target.device).index_add(0, atom, torch.ones_like(atom))
    first_of_atom = counts.cumsum(0) - counts
    others = counts[atom] - 1
    first_of_edge = others.cumsum(0) - others
    arm = torch.repeat_interleave(torch.arange(near.shape[0], device=target.device), others)
    rank = torch.arange(arm.shape[0], device=target.device) - first_of_edge[arm]
    begin = first_of_atom[atom[arm]]
    # The other arm is one of the atom's edges without the arm itself.
    return near[arm], near[begin + rank + (rank >= arm - begin).long()]
