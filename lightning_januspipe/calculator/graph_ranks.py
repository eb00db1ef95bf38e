"""Evaluates a potential on several graph ranks, each of which has a part of the atoms and of the memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms
from torch import Tensor, nn

from lightning_januspipe.distributed import broadcast_module, waiting
from lightning_januspipe.mesh import Mesh, MeshShape

if TYPE_CHECKING:
    from lightning_januspipe.runtime.pipeline import Pipeline

LEAST_ATOMS = 8
"""Structures with fewer atoms are evaluated whole, by every rank."""

_LARGEST_EXAMPLE = 20
"""Atoms of the larger one of the structures that the potential is captured with."""


class GraphRanks(nn.Module):
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
        super().__init__()
        join(num_ranks, device)
        self.potential, self._evaluate, self._compiles = potential, evaluate, compiles
        for parameter in potential.parameters():  # a capture is validated by the gradients of all parameters
            parameter.requires_grad_(parameter.is_floating_point())
        self._mesh = Mesh(MeshShape(1, 1, num_ranks), dist.get_rank(), device)
        broadcast_module(potential, device)
        self._pipeline: Pipeline | None = None

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Returns the results of a batch; this is what is captured."""
        return self._evaluate(self.potential, batch)

    def evaluate(self, batch: Any, atoms: Atoms, make_batch: Callable[[Atoms], Any]) -> dict[str, Tensor]:
        """Returns the results of one structure on every rank.

        Args:
            batch: The batch of the structure.
            atoms: The structure.
            make_batch: Makes a batch of a structure.

        Raises:
            CaptureError: The potential cannot be captured, or not be sharded.
            PipelineError: The ranks have different structures.
        """
        if self._pipeline is None:
            self._pipeline = self._captured(lambda: (make_batch(part) for part in parts_of(atoms)))
        found: dict[str, Tensor] = self._pipeline.evaluate_step(self.step, batch)
        return found

    def _captured(self, examples: Callable[[], Any]) -> Pipeline:
        from lightning_januspipe.runtime.build_pipeline import CaptureRequest, PipelineBuilder

        @contextmanager
        def ready(training: bool) -> Generator[None, None, None]:
            self.train(training)
            try:
                with torch.enable_grad():
                    yield
            finally:
                self.eval()

        builder = PipelineBuilder("1f1b-fold", "auto", None, None, "auto", compiles=self._compiles)
        request = CaptureRequest(self, self.step, lambda: tuple(examples()), 1, ready, trains=False)
        return builder.pipeline(request, self._mesh, self._mesh.rank, self._broadcast)[0]

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


def parts_of(atoms: Atoms) -> tuple[Atoms, Atoms]:
    """Returns two small parts of a structure around its first atom, with as many periodic directions and the cell."""
    order = np.argsort(atoms.get_distances(0, np.arange(len(atoms)), mic=bool(atoms.pbc.any())), kind="stable")
    larger = min(len(atoms), _LARGEST_EXAMPLE)
    return atoms[order[: larger // 2]], atoms[order[:larger]]
