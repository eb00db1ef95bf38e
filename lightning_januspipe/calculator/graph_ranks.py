"""Evaluates a potential on several graph ranks, each of which has a part of the atoms and of the memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.captured_phases import CapturedPhases
from lightning_januspipe.distributed import broadcast_module, waiting
from lightning_januspipe.mesh import Mesh, MeshShape

LEAST_ATOMS = 8
"""Structures with fewer atoms are evaluated whole, by every rank."""


class GraphRanks(CapturedPhases):
    """Evaluates structures whose atoms are sharded over all ranks of the job; every rank gets all results.

    The potential is captured at the first evaluation, with two small parts of the structure. All ranks have to evaluate
    the same structures, in the same order.

    Args:
        potential: The potential, which gets the weights of the first rank.
        evaluate: From the potential and a batch to its results.
        device: This rank's device.
        num_ranks: Number of ranks, G.
        compiles: Whether the phases are compiled.

    Raises:
        ValueError: This process is not one of a job of so many ranks.
    """

    def __init__(
        self,
        potential: nn.Module,
        evaluate: Callable[[nn.Module, Any], dict[str, Tensor]],
        device: torch.device,
        num_ranks: int,
        compiles: bool,
    ) -> None:
        join(num_ranks, device)
        super().__init__(potential, evaluate, Mesh(MeshShape(1, 1, num_ranks), dist.get_rank(), device), compiles)
        broadcast_module(potential, device)

    @override
    def _broadcast(self, value: Any) -> Any:
        held = [value]
        with waiting("what the first rank has captured", self._mesh.host_group):
            dist.broadcast_object_list(held, src=0, group=self._mesh.host_group)
        return held[0]


def join(num_ranks: int, device: torch.device) -> None:
    """Joins the job that ``torchrun`` has started, if this process has not joined it yet.

    Args:
        num_ranks: Number of ranks of the job.
        device: This rank's device.

    Raises:
        ValueError: There is no such job, or it has another number of ranks.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if size != num_ranks:
        raise ValueError(
            f"graph_size={num_ranks}, but there {'is one process' if size == 1 else f'are {size} processes'}. Start "
            f"the script by torchrun --nproc_per_node {num_ranks}"
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
