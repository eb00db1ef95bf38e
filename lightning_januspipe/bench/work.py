"""Defines the work on which benchmarks compare configurations, and the Trainer that does it."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Work:
    """Describes the work that is the same for every configuration.

    Attributes:
        data: An extxyz file; without it, boxes of metal are made with ASE's EMT.
        num_atoms: Atoms in a box of EMT metal, about.
        batch_size: Structures in a batch.
        steps: Timed optimizer steps of a run; five more warm up, until the schedule is settled.
        num_layers: Layers of the potential.
        num_features: Channels of the potential.
        l_max: Largest degree of the potential's features.
        cutoff: Cutoff of the potential, in Å.
        dtype: Type of the potential and of all that is computed with it.
    """

    data: str | None = None
    num_atoms: int = 108
    batch_size: int = 8
    steps: int = 3
    num_layers: int = 4
    num_features: int = 32
    l_max: int = 1
    cutoff: float = 5.0
    dtype: Literal["float32", "float64"] = "float32"

    def potential(self, samples: Any, species: Sequence[str]) -> nn.Module:
        """Returns the reference potential in the default dtype, scaled and shifted to samples.

        Args:
            samples: A dataset of some samples.
            species: Chemical symbols of all samples.
        """
        from lightning_januspipe.data import dataset_statistics
        from lightning_januspipe.models import EquivariantPotential

        found = dataset_statistics(samples, len(species))
        return EquivariantPotential(
            species,
            self.cutoff,
            num_layers=self.num_layers,
            num_features=self.num_features,
            l_max=self.l_max,
            avg_num_neighbors=max(found.avg_num_neighbors, 1.0),
            per_species_shift=list(found.energy_shifts),
        )


def trainer_of(strategy: dict[str, Any] | None, steps: int, callback: Any, **arguments: Any) -> Any:
    """Returns a quiet Trainer over this job's processes.

    Args:
        strategy: Arguments of the strategy; None for plain Lightning.
        steps: Number of optimizer steps.
        callback: The callback that measures.
        arguments: More arguments of the Trainer.
    """
    from lightning_januspipe.testing import quiet_trainer

    world = int(os.environ["WORLD_SIZE"])
    return quiet_trainer(
        strategy, devices=world, max_steps=steps, callbacks=[callback], limit_val_batches=0, **arguments
    )


def function_of(path: str) -> Any:
    """Returns the function that ``module:function`` names.

    Raises:
        ValueError: There is no such function.
    """
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name, None) if module and name else None
    if function is None:
        raise ValueError(f"{path!r} names no function; expected module:function, with the module on PYTHONPATH")
    return function


def resident(name: str) -> int:
    """Returns an entry of Linux's account of this process's memory: ``VmRSS``, or the peak ``VmHWM``, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """Lets the peak ``VmHWM`` of this process count from here."""
    Path("/proc/self/clear_refs").write_text("5")
