"""Holds the reference potentials and the LightningModule that trains it, all usable without the strategy."""

from lightning_januspipe.models.conservative import ConservativePotential
from lightning_januspipe.models.lightning_module import PotentialModule
from lightning_januspipe.models.loading import describe, load
from lightning_januspipe.models.matris_moe import MatRISMoE
from lightning_januspipe.models.potential import EnergyModel, EquivariantPotential

__all__ = [
    "ConservativePotential",
    "EnergyModel",
    "EquivariantPotential",
    "MatRISMoE",
    "PotentialModule",
    "describe",
    "load",
]
