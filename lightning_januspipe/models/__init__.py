"""Holds the reference potential and the LightningModule that trains it, both usable without the strategy."""

from lightning_januspipe.models.lightning_module import PotentialModule
from lightning_januspipe.models.loading import describe, load
from lightning_januspipe.models.potential import ConservativePotential, EnergyModel, EquivariantPotential

__all__ = ["ConservativePotential", "EnergyModel", "EquivariantPotential", "PotentialModule", "describe", "load"]
