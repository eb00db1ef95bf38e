"""Counts how evenly experts load ranks on a mixture of molecules and oxides, as they are placed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_januspipe.expert_ranks.expert_costs import DECLARED
from lightning_januspipe.expert_ranks.expert_placement import (
    ExpertPlacement,
    Guests,
    best_guests,
    rows_of_ranks,
)

if TYPE_CHECKING:
    from ase import Atoms

_METALS = {"rocksalt": ("Mg", "Ca", "Ti", "Mn", "Fe", "Ni"), "fluorite": ("Zr", "Ce", "Hf", "U")}
_CONSTANTS = {"rocksalt": 4.4, "fluorite": 5.2}


def expert_loads(
    steps: int = 100, batch_size: int = 8, num_replicas: int = 8, share_of_oxides: float = 0.5, seed: int = 0
) -> str:
    """Counts rows of experts on ranks, on molecules and oxides.

    Nothing is trained or timed: the experts of each element are those of MatRISMoE when its training begins.

    Args:
        steps: Steps that are counted.
        batch_size: Structures of each replica in a step.
        num_replicas: Replicas, all on the ranks that share the experts.
        share_of_oxides: How many of the structures are oxides.
        seed: Seed of the structures and of the experts of the elements.
    """
    from lightning_januspipe.models.matris_moe import ELEMENTS, SIZES

    structures = [[_described(atoms) for atoms in kind] for kind in mixture_of_structures()]
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batches = [
        [draw.choice(structures[draw.random() < share_of_oxides]) for _ in range(batch_size * num_replicas)]
        for _ in range(steps)
    ]
    counted = [_rows_of_elements(batch, ELEMENTS) for batch in batches]
    lines = [
        f"{steps} steps of {batch_size * num_replicas} structures, {share_of_oxides:.0%} of them oxides; rows of the "
        "rank with the most, relative to the mean (1 is even), as a mean over steps",
        "",
        "| size | rows | `expert_size` | in order | placed by load | moves | with guests | moves | guests in a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in ("S", "M", "L"):
        num_experts, top_k = SIZES[size]["num_experts"], SIZES[size]["top_k"]
        chosen = torch.randn(len(ELEMENTS), num_experts, generator=generator).topk(top_k, dim=1).indices
        for kind, name in enumerate(("edges", "atoms")):
            loads = [_of_experts(rows[kind], chosen, num_experts) for rows in counted]
            for num_ranks in (2, 4, 8):
                fixed = _imbalance(loads, num_ranks, "order")[0]
                placed, moved, _ = _imbalance(loads, num_ranks, "load")
                with_guests, also_moved, num_guests = _imbalance(loads, num_ranks, "replicate")
                words = f"{size} ({num_experts} experts, top {top_k}) | {name} | {num_ranks}"
                found = f"{fixed:.2f} | {placed:.2f} | {moved} | {with_guests:.2f} | {also_moved} | {num_guests:.1f}"
                lines.append(f"| {words} | {found} |")
    return "\n".join(lines)


def _imbalance(
    loads: Sequence[Sequence[int]], num_ranks: int, placement: Literal["order", "load", "replicate"]
) -> tuple[float, int, float]:
    """Returns the mean over steps of the largest rank's rows relative to the mean, moves, and guests in a step."""
    placed, has_guests = ExpertPlacement(len(loads[0]), num_ranks), placement == "replicate"
    largest, num_guests = [], []
    for load in loads:
        if placement != "order":
            placed.see(load, has_guests)
        rows = max(rows_of_ranks(load, placed.order, num_ranks))
        found = best_guests(load, placed.order, num_ranks, DECLARED.guest) if has_guests else Guests((), rows)
        largest.append(found.slowest * num_ranks / max(sum(load), 1))
        num_guests.append(len(found.guests))
    return float(np.mean(largest)), placed.num_moves, float(np.mean(num_guests))


def _of_experts(rows: np.ndarray[Any, Any], chosen: torch.Tensor, num_experts: int) -> list[int]:
    """Returns the rows of each expert from those of each element."""
    of_elements = torch.from_numpy(rows)[:, None].expand_as(chosen)
    counts = torch.zeros(num_experts, dtype=torch.int64).index_add(0, chosen.flatten(), of_elements.flatten())
    found: list[int] = counts.tolist()
    return found


def _rows_of_elements(batch: Sequence[Any], elements: Sequence[str]) -> np.ndarray[Any, Any]:
    """Returns (2, elements) numbers of edges to, and of atoms of, each element."""
    found = np.zeros((2, len(elements)), dtype=np.int64)
    for numbers, degrees in batch:
        np.add.at(found[0], numbers - 1, degrees)
        np.add.at(found[1], numbers - 1, 1)
    return found


def mixture_of_structures(repeat: int = 2) -> tuple[list[Atoms], list[Atoms]]:
    """Returns molecules (the G2 set of ASE without single atoms), and oxides with two structures.

    Args:
        repeat: Cubic cells of an oxide along two axes.
    """
    from ase.build import bulk
    from ase.collections import g2

    oxides = [
        bulk(f"{metal}O" if kind == "rocksalt" else f"{metal}O2", kind, a=_CONSTANTS[kind], cubic=True)
        * (repeat, repeat, 1)
        for kind, metals in _METALS.items()
        for metal in metals
    ]
    return [atoms for name in g2.names if len(atoms := g2[name]) > 1], oxides


def _described(atoms: Atoms) -> tuple[Any, Any]:
    """Returns atomic numbers, and numbers of neighbours within 6 Å."""
    from lightning_januspipe.data.neighbors import neighbor_list

    edges = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 6.0)[0]
    return atoms.numbers, np.bincount(edges[1], minlength=len(atoms))
