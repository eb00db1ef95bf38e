"""Predicts memory and step time of MatRIS-MoE in groups of ranks that share state, graphs and experts (FS-3D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_januspipe.bench.step_costs import Speeds, measured_speeds
from lightning_januspipe.bench.step_counts import BatchSizes, StepCounts, count_step
from lightning_januspipe.runtime.state_share import StateShare, state_share

_FLOAT = 4  # bytes
_TIMED_ROWS = 2048
EXCHANGES = 4
"""Exchanges of rows in the four phases, for each in the energy; tests count them."""


@dataclass(frozen=True)
class Numbers:
    """Holds the numbers of one size that ranks have and send.

    Attributes:
        experts: Numbers in the matrices of experts.
        others: All other parameters.
        sent: Numbers that rows of one atom take to the experts and back, in the energy.
    """

    experts: int
    others: int
    sent: int

    def state(self, num_ranks: int, group_size: int) -> tuple[StateShare, StateShare]:
        """Returns what experts, and all other parameters, take on a rank in float32 with ``shard="parameters"``.

        Args:
            num_ranks: Number of all ranks.
            group_size: Number of ranks that share experts.
        """
        own, others, num_owners = _FLOAT * self.experts / group_size, _FLOAT * self.others, num_ranks // group_size
        of_experts = state_share("optimizer" if num_owners > 1 else "none", num_owners, own, 2 * own)
        return of_experts, state_share("parameters", num_ranks, others, 2 * others)


def predicted_steps(
    atoms: int = 32,
    edges: int = 78,
    angles: int = 306,
    group_size: int = 8,
    imbalance: float = 1.0,
    memory: float = 8e10,
    products: float = 4e13,
    bandwidth: float = 3e12,
    indexed: float = 1e11,
    launch: float = 5e-6,
    group_bandwidth: float = 3e11,
    network_bandwidth: float = 4e10,
    exchange_bytes: int = _FLOAT,
    measure: bool = False,
) -> str:
    """Predicts memory and step time of MatRIS-MoE S, M and L on 8 to 1,024 GPUs.

    Operations and bytes of a step with eager phases are counted. Speeds of devices and networks are declared, unless
    they are measured: give your own. In the prediction nothing overlaps, and there are no halos. Each group has all
    experts; their optimizer state, and all of the other parameters, are in shards over all ranks.

    Args:
        atoms: Atoms on each rank in a step.
        edges: Neighbours of each atom within 6 Å; by default those in copper.
        angles: Angles at each atom between edges within 4 Å, in both orders; by default those in copper.
        group_size: Ranks that share experts.
        imbalance: Rows of the rank with the most, relative to the mean, as `januspipe bench experts` counts them.
        memory: Bytes of a GPU's memory, for the number of atoms that fit.
        products: Additions and multiplications in products of matrices in float32 that a GPU does in a second.
        bandwidth: Bytes that a GPU's other operations read and write in a second.
        indexed: Numbers that a GPU takes, or adds to others, by an index in a second, beside what their bytes take.
        launch: Seconds that each operation takes on a GPU, however small it is.
        group_bandwidth: Bytes that a GPU sends in a second to others of its group.
        network_bandwidth: Bytes that a GPU sends in a second to other groups.
        exchange_bytes: Bytes of each number of the rows that travel; 2 would be half precision.
        measure: Whether the four speeds of a device are measured instead, on this machine's first GPU, or its CPU.
    """
    speeds, how = Speeds(products, indexed, bandwidth, launch), "declared"
    if measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        speeds, how = _measured_on(device), f"measured on {device.type}"
    lines = [
        f"{atoms} atoms with {edges} neighbours and {angles} angles on each GPU; groups of {group_size}, whose busiest "
        f"rank has {imbalance:g} times the mean rows",
        f"{how}, in a second: {speeds.products:.3g} operations of products, {speeds.bandwidth:.3g} B, "
        f"{speeds.indexed:.3g} numbers by an index; {speeds.launch:.2g} s for each operation",
        f"declared: {group_bandwidth:.3g} B in a group and {network_bandwidth:.3g} B between groups in a second",
        "",
        "| size | GPUs | GB between steps | GB kept by phases | GB in a step | "
        f"atoms that fit in {memory / 1e9:g} GB | products, s | other operations, s | rows, s | state, s | step, s |",
        "|---" * 11 + "|",
    ]
    for size in ("S", "M", "L"):
        numbers, counts = count_size(size, edges), count_step(BatchSizes(atoms, atoms * edges, atoms * angles), size)
        for gpus in (8, 32, 128, 512, 1024):
            of_experts, of_others = numbers.state(gpus, group_size)
            slowest = network_bandwidth if gpus > group_size else group_bandwidth
            sent = numbers.sent * EXCHANGES * atoms * imbalance * exchange_bytes * (1 - 1 / group_size)
            times = [
                *local_seconds(counts, speeds, gpus, group_size, imbalance),
                sent / group_bandwidth,
                of_others.sent / slowest + of_experts.sent / network_bandwidth,
            ]
            kept = (counts.rows * imbalance + counts.others).kept
            in_phases = of_experts.in_phases + of_others.in_phases
            fitting = max(int((memory - in_phases) / (kept / atoms)), 0)
            words = [f"{b / 1e9:.3g}" for b in (of_experts.between + of_others.between, kept, in_phases + kept)]
            words += [f"{fitting:,}", *(f"{t:.3g}" for t in (*times, sum(times)))]
            lines.append(f"| {size} | {gpus:,} | {' | '.join(words)} |")
    return "\n".join(lines)


def local_seconds(
    counts: StepCounts, speeds: Speeds, num_ranks: int, group_size: int, imbalance: float = 1.0
) -> tuple[float, float]:
    """Returns the seconds of products and of all other operations on the busiest rank, with those of the optimizer.

    Args:
        counts: What a rank does that has all experts, and all parameters.
        speeds: Speeds of its device.
        num_ranks: Number of all ranks; the optimizer steps of all are as large.
        group_size: Number of ranks that share experts.
        imbalance: Rows of the busiest rank, relative to the mean.
    """
    load = counts.rows * imbalance + counts.matrices * (1 / group_size) + counts.others
    return speeds.seconds(load + counts.optimizer * (1 / num_ranks), counts.num_operations + counts.num_updates)


def _measured_on(device: torch.device) -> Speeds:
    """Returns the speeds for experts of the width of S."""
    from lightning_januspipe.models.matris_moe import SIZES

    return measured_speeds(device, _TIMED_ROWS, 3 * 128, SIZES["S"]["expert_features"])


def count_size(size: Any, edges: int) -> Numbers:
    """Counts the parameters and rows of one of the sizes of MatRIS-MoE.

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
    sent = 0
    for index, (mixture, weights) in enumerate(zip(mixtures, parts, strict=True)):
        is_of_messages = index % 2 == 0  # a block makes messages of edges, and then updates atoms
        sent += mixture.top_k * (edges if is_of_messages else 1) * (weights[0].shape[1] + weights[-1].shape[2])
    return Numbers(experts, sum(p.numel() for p in potential.parameters()) - experts, sent)
