"""The work that benchmarks compare configurations on: the potential, and the Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Work:
    """The same work for every configuration.

    Attributes:
        data: an extxyz file; None for boxes of metal made with ASE's EMT.
        num_atoms: about how many atoms a box of EMT metal has.
        batch_size: structures in a batch.
        steps: timed optimizer steps of a run; five more warm up, until the schedule is settled.
        num_layers: layers of the potential.
        num_features: channels of the potential.
        l_max: largest degree of its features.
        cutoff: its cutoff, in Å.
        dtype: of the potential and of what is computed with it.
    """

    data: str | None = None
    num_atoms: int = 108
    batch_size: int = 8
    steps: int = 3
    num_layers: int = 4
    num_features: int = 32
    l_max: int = 1
    cutoff: float = 5.0
    dtype: str = "float32"

    def potential(self, samples: Any, species: Sequence[str]) -> nn.Module:
        """The reference potential, in the default dtype, scaled and shifted to samples.

        Args:
            samples: a dataset of some of them.
            species: of all.
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
    """A quiet Trainer over this job's processes.

    Args:
        strategy: arguments of the strategy; None for plain Lightning.
        steps: how many optimizer steps.
        callback: what measures.
        arguments: more of the Trainer's.
    """
    from lightning_januspipe.testing import quiet_trainer

    world = int(os.environ["WORLD_SIZE"])
    return quiet_trainer(
        strategy, devices=world, max_steps=steps, callbacks=[callback], limit_val_batches=0, **arguments
    )
