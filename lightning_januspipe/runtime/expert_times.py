"""Measures what moves and guests of experts cost, in rows that a rank could compute in the same time.

Each time is that of the slowest rank, so that all ranks decide by the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.distributed import waiting
from lightning_januspipe.expert_ranks.expert_costs import DECLARED, ExpertCosts, RowCost
from lightning_januspipe.experts import grouped_linear
from lightning_januspipe.graph.exchange import send_rows_to_each
from lightning_januspipe.mesh import Mesh

_MEASURING = "measurement of what experts cost"
_MOST_BYTES = 2**24
"""Most bytes of the message that is timed."""
_MOST_ROWS = 2048
"""Most rows that are timed: rows of the inner width of large experts take much memory."""
_REPEATS = 3


@dataclass(frozen=True)
class ExpertTimes:
    """Holds the seconds that one mixture of experts takes on the slowest rank.

    Attributes:
        row: of the four phases of one row.
        message: of an exchange between the ranks in which next to nothing is sent.
        expert: for sending one expert's parameters.
        copy: for copying the parameters of a rank's own experts once.
        num_weights: number of parameters with an entry for each expert.
        num_states: number of numbers that the optimizer keeps for each number of a parameter.
    """

    row: float
    message: float
    expert: float
    copy: float
    num_weights: int
    num_states: int

    def in_rows(self) -> ExpertCosts:
        """Returns the costs of moves and guests.

        Each parameter, and each part of its optimizer state, moves in a message of its own. Each parameter of guests
        comes in one, and its gradient goes back in another; own entries are copied to have the guests behind them, and
        again when these go. Before moves and after steps with guests ranks tell each other which gradients there are.
        """
        num_moved = 1 + self.num_states

        def rows(seconds: float) -> int:
            return ceil(seconds / self.row)

        move = RowCost(rows(self.message * (1 + self.num_weights * num_moved)), rows(self.expert * num_moved))
        once = self.message * (1 + 2 * self.num_weights) + 2 * self.copy
        return ExpertCosts(move, RowCost(rows(once), rows(2 * self.expert)))


def expert_costs(
    mixtures: Sequence[Sequence[Tensor]], rows: Sequence[int], num_states: int, mesh: Mesh
) -> list[ExpertCosts]:
    """Returns the costs of moves and guests of mixtures of experts; all ranks that hold the stages take part.

    They are measured now, unless torch is to be deterministic (``Trainer(deterministic=True)``): then they are those
    that are declared, so that experts are in the same places whenever a training runs.

    Args:
        mixtures: for each mixture, the (K', I, O) entries of this rank's own experts in its parameters.
        rows: how many rows a rank computes for each mixture in a micro-batch, about; the same on all ranks.
        num_states: see :class:`ExpertTimes`.
        mesh: this rank's process groups, with those of experts.

    Raises:
        RankLostError: a rank did not answer.
    """
    if torch.are_deterministic_algorithms_enabled():
        return [DECLARED for _ in mixtures]
    return [times.in_rows() for times in measured_times(mixtures, rows, num_states, mesh)]


def measured_times(
    mixtures: Sequence[Sequence[Tensor]], rows: Sequence[int], num_states: int, mesh: Mesh
) -> list[ExpertTimes]:
    """Measures mixtures of experts; arguments and errors are those of :func:`expert_costs`."""
    sizes = [sum(w[0].numel() * w.element_size() for w in weights) for weights in mixtures]
    sent = min(max(sizes, default=1), _MOST_BYTES)
    message, with_expert = (_seconds_of_message(num_bytes, mesh) for num_bytes in (1, sent))
    found = [message, max(with_expert - message, with_expert / 4) / sent]  # no byte is free, whatever times differ by
    for weights, num_rows in zip(mixtures, rows, strict=True):
        found += [seconds_of_row(weights, num_rows, mesh.device), _seconds_of_copy(weights, mesh.device)]
    slowest = torch.tensor(found, dtype=torch.float64, device=mesh.device)
    for group in (mesh.expert_group, mesh.expert_copies_group):
        if group is not None:
            with waiting(_MEASURING, group):
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    message, of_byte, *of_mixtures = slowest.tolist()
    return [
        ExpertTimes(row, message, of_byte * size, copy, len(weights), num_states)
        for row, copy, size, weights in zip(of_mixtures[::2], of_mixtures[1::2], sizes, mixtures, strict=True)
    ]


def _seconds_of_message(num_bytes: int, mesh: Mesh) -> float:
    """Returns the seconds in which each rank that shares experts sends a number of bytes to the next one."""
    size, rank = mesh.expert_size, mesh.expert_rank
    to, of = ([int(r == (rank + step) % size) for r in range(size)] for step in (1, -1))
    sent = torch.zeros(1, num_bytes, dtype=torch.uint8, device=mesh.device)
    received = torch.empty_like(sent)
    return _seconds(lambda: send_rows_to_each(received, sent, of, to, mesh.expert_group, _MEASURING), mesh.device)


def _seconds_of_copy(weights: Sequence[Tensor], device: torch.device) -> float:
    return _seconds(lambda: [weight.detach().clone() for weight in weights], device)


def seconds_of_row(weights: Sequence[Tensor], num_rows: int, device: torch.device) -> float:
    """Returns the seconds of the four phases of one row, of the products with the parameters of experts.

    The time of few rows is subtracted from that of more, so that what a phase takes for any number is left out.
    """
    most = min(max(num_rows, 256), _MOST_ROWS)
    few, many = (_seconds(partial(_run_rows, weights, num), device) for num in (most // 4, most))
    return max(many - few, many / 4) / (most - most // 4)


def _run_rows(weights: Sequence[Tensor], num_rows: int) -> None:
    """Computes the gradients of a loss of forces through each parameter, six products with its matrices for a row."""
    for values in weights:
        weight = values.detach().requires_grad_()
        x = weight.new_ones(num_rows, weight.shape[1]).requires_grad_()
        expert = torch.arange(num_rows, device=x.device) * len(weight) // num_rows
        with torch.enable_grad():
            energy = grouped_linear(x, weight, expert).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            torch.autograd.grad(force.square().sum(), [x, weight])


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest time of some calls, after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        _wait_for(device)
        began = time.perf_counter()
        function()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return max(min(times[1:]), 1e-9)  # clocks have a resolution


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
