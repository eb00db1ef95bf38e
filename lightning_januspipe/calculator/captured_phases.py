"""Evaluates structures by the phases of a potential that was captured as in training."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from lightning_januspipe.mesh import Mesh

if TYPE_CHECKING:
    from lightning_januspipe.runtime.pipeline import Pipeline

_LEAST_EXAMPLE = 4
"""Atoms of the smaller one of the structures that a potential is captured with, in one process."""

_LARGEST_EXAMPLE = 20
"""Atoms of the larger one, where it is a part of a structure."""


class CapturedPhases(nn.Module):
    """Evaluates batches by FE and FF of a potential, which is captured at the first evaluation.

    Args:
        potential: The potential.
        evaluate: From the potential and a batch to its results.
        mesh: This rank's process groups.
        compiles: Whether the phases are compiled.
    """

    def __init__(
        self, potential: nn.Module, evaluate: Callable[[nn.Module, Any], dict[str, Tensor]], mesh: Mesh, compiles: bool
    ) -> None:
        super().__init__()
        self.potential, self._evaluate, self._mesh, self._compiles = potential, evaluate, mesh, compiles
        for parameter in potential.parameters():  # a capture is validated by the gradients of all parameters
            parameter.requires_grad_(parameter.is_floating_point())
        self._pipeline: Pipeline | None = None
        self._entries: frozenset[Any] = frozenset()

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Returns the results of a batch; this is what is captured."""
        return self._evaluate(self.potential, batch)

    def evaluate(self, batch: Any, examples: Callable[[], tuple[Any, Any]]) -> dict[str, Tensor]:
        """Returns the results of a batch.

        Args:
            batch: The batch.
            examples: Makes two small batches of different sizes, with which the potential is captured.

        Raises:
            CaptureError: The potential cannot be captured, or not be sharded.
            PipelineError: The ranks have different batches.
        """
        if self._pipeline is None:
            self._pipeline, self._entries = self._captured(examples), _entries(batch)
        found: dict[str, Tensor] = self._pipeline.evaluate_step(self.step, batch)
        return found

    def takes(self, batch: Any) -> bool:
        """Returns whether a batch has the entries of the first one, such as a cell."""
        return self._pipeline is None or _entries(batch) == self._entries

    def why_eager(self) -> str | None:
        """Returns in words why phases are not compiled, after the first evaluation; None where they are."""
        assert self._pipeline is not None and self._pipeline.compile_report is not None
        return "; ".join(self._pipeline.compile_report.eager) or None

    def _captured(self, examples: Callable[[], tuple[Any, Any]]) -> Pipeline:
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
        request = CaptureRequest(self, self.step, examples, 1, ready, trains=False)
        return builder.pipeline(request, self._mesh, self._mesh.rank, self._broadcast)[0]

    def _broadcast(self, value: Any) -> Any:
        """Returns a value of the first rank."""
        return value


def _entries(batch: Any) -> frozenset[Any]:
    """Returns the names of what a batch has, where it is a mapping."""
    items = batch.items() if isinstance(batch, Mapping) else ()
    return frozenset(name for name, value in items if value is not None)


def examples_of(atoms: Atoms) -> tuple[Atoms, Atoms]:
    """Returns two small structures of different sizes with the elements and the periodic directions of a structure.

    Args:
        atoms: The structure; any number of atoms with a pair of neighbours among them.
    """
    atoms = atoms.copy()
    atoms.set_constraint()  # some constraints cannot be repeated
    if len(atoms) >= _LARGEST_EXAMPLE:
        return parts_of(atoms)
    smaller = atoms
    while len(smaller) < _LEAST_EXAMPLE:
        smaller = doubled(smaller)
    return smaller, doubled(smaller)


def doubled(atoms: Atoms) -> Atoms:
    """Returns a structure repeated along its first periodic direction, or with a copy of it beside it."""
    if atoms.pbc.any():
        repeats = [1, 1, 1]
        repeats[int(atoms.pbc.argmax())] = 2
        return atoms * repeats
    copy = atoms.copy()
    copy.positions[:, 0] += float(np.ptp(atoms.positions[:, 0])) + 2.0
    return atoms + copy


def parts_of(atoms: Atoms) -> tuple[Atoms, Atoms]:
    """Returns two small parts of a structure around its first atom, with as many periodic directions and the cell."""
    order = np.argsort(atoms.get_distances(0, np.arange(len(atoms)), mic=bool(atoms.pbc.any())), kind="stable")
    larger = min(len(atoms), _LARGEST_EXAMPLE)
    return atoms[order[: larger // 2]], atoms[order[:larger]]
