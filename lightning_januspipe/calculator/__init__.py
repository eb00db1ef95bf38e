"""Runs a trained potential as a calculator of ASE: molecular dynamics, relaxations and single points."""

from lightning_januspipe.calculator import packages
from lightning_januspipe.calculator.adapter import AtomsAdapter, StructureAdapter
from lightning_januspipe.calculator.calculator import JanusPipeCalculator
from lightning_januspipe.calculator.packages import *  # noqa: F403 (the list of adapters stands there)
from lightning_januspipe.calculator.skin import Edges, SkinNeighborList

__all__ = ["AtomsAdapter", "Edges", "JanusPipeCalculator", "SkinNeighborList", "StructureAdapter"]
__all__ += packages.__all__
