"""Predicts memory and step time of MatRIS-MoE in groups of ranks that share state, graphs and experts (FS-3D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FLOAT = 4  # bytes
_TIMED_EXPERTS, _TIMED_ROWS = 3, 2048
PRODUCTS = 6
"""Products with the matrices of experts in the four phases, for each in the energy; tests count them."""

EXCHANGES = 4
"""Exchanges of rows in the four phases, for each in the energy; tests count them."""


@dataclass(frozen=True)
class Counted:
    """Holds what is counted of one size.

    Attributes:
        experts: Numbers in the matrices of experts.
        others: All other parameters.
        products: Multiplications of matrices of experts for one atom, in the energy.
        sent: Numbers that rows of one atom take to the experts and back, in the energy.
    """

    experts: int
    others: int
    products: int
    sent: int


def predicted_steps(
    atoms: int = 256,
    edges: int = 60,
    group_size: int = 8,
    operations: float = 4e13,
    group_bandwidth: float = 3e11,
    network_bandwidth: float = 4e10,
    exchange_bytes: int = _FLOAT,
    measure: bool = False,
) -> str:
    """Predicts memory and step time of MatRIS-MoE S, M and L on 8 to 1,024 GPUs.

    Bytes and products are counted. Speeds of devices and networks are declared, not measured: give your own. Nothing
    overlaps in the prediction, attention and all other operations than products with experts cost nothing, and all
    ranks have equal loads. Each group has all experts; all other parameters are in shards over all ranks.

    Args:
        atoms: Atoms on each rank in a step.
        edges: Neighbours of each atom.
        group_size: Ranks that share experts.
        operations: Additions and multiplications in float32 that a GPU does in a second.
        group_bandwidth: Bytes that a GPU sends in a second to others of its group.
        network_bandwidth: Bytes that a GPU sends in a second to other groups.
        exchange_bytes: Bytes of each number of the rows that travel; 2 would be half precision.
        measure: Whether operations are measured on this machine, on its first GPU if it has one, instead.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operations = measured_operations(device) if measure else operations
    how = f"measured on {device.type}" if measure else "declared"
    lines = [
        f"{atoms} atoms with {edges} neighbours on each GPU; groups of {group_size}; {how}: {operations:.3g} "
        f"operations in a second; declared: {group_bandwidth:.3g} B in a group and {network_bandwidth:.3g} B between "
        "groups in a second",
        "",
        "| size | GPUs | GB between steps | GB in a step | products, s | rows, s | state, s | step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in ("S", "M", "L"):
        counted = count_size(size, edges)
        for gpus in (8, 32, 128, 512, 1024):
            num_groups = gpus // group_size
            own = counted.experts / group_size
            between = 3 * _FLOAT * (counted.others / gpus + own)
            during = between + _FLOAT * (2 * counted.others + own)  # gathered parameters, and gradients
            products = 2 * counted.products * PRODUCTS * atoms / operations
            rows = counted.sent * EXCHANGES * atoms * exchange_bytes * (1 - 1 / group_size) / group_bandwidth
            slowest = network_bandwidth if num_groups > 1 else group_bandwidth
            state = 2 * _FLOAT * counted.others * (1 - 1 / gpus) / slowest
            state += 2 * _FLOAT * own * (1 - 1 / num_groups) / network_bandwidth
            times = (products, rows, state, products + rows + state)
            words = " | ".join(f"{t:.3g}" for t in times)
            lines.append(f"| {size} | {gpus:,} | {between / 1e9:.3g} | {during / 1e9:.3g} | {words} |")
    return "\n".join(lines)


def measured_operations(device: torch.device) -> float:
    """Returns how many additions and multiplications experts of the width of S do in a second, in the four phases."""
    from lightning_januspipe.models.matris_moe import SIZES
    from lightning_januspipe.runtime.expert_times import seconds_of_row

    width = SIZES["S"]["expert_features"]
    shapes = [(128, width), (128, width), (width, 128)]
    weights = [torch.rand(_TIMED_EXPERTS, *shape, device=device) for shape in shapes]
    return 2 * PRODUCTS * sum(w[0].numel() for w in weights) / seconds_of_row(weights, _TIMED_ROWS, device)


def count_size(size: Any, edges: int) -> Counted:
    """Counts one of the sizes of MatRIS-MoE.

    Args:
        size: Its name.
        edges: Neighbours of each atom.
    """
    from lightning_januspipe.experts import ElementExperts
    from lightning_januspipe.models import MatRISMoE

    with torch.device("meta"):
        potential = MatRISMoE.from_size(size)
    mixtures = [m for m in potential.modules() if isinstance(m, ElementExperts)]
    parts = [[p.weight for p in (m.core, m.gate, m.out) if p is not None] for m in mixtures]
    experts = sum(w.numel() for weights in parts for w in weights)
    products = sent = 0
    for index, (mixture, weights) in enumerate(zip(mixtures, parts, strict=True)):
        is_of_messages = index % 2 == 0  # a block makes messages of edges, and then updates atoms
        per_atom = mixture.top_k * (edges if is_of_messages else 1)
        products += per_atom * sum(w[0].numel() for w in weights)
        sent += per_atom * (weights[0].shape[1] + weights[-1].shape[2])
    total = sum(p.numel() for p in potential.parameters())
    return Counted(experts, total - experts, products, sent)
