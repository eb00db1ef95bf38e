"""Runs a trained potential as a calculator of ASE: molecular dynamics, relaxations and single points."""

from lightning_januspipe.calculator.adapter import AtomsAdapter, StructureAdapter
from lightning_januspipe.calculator.calculator import JanusPipeCalculator
from lightning_januspipe.calculator.packages import (
    MACEAtomsAdapter,
    MatGLAtomsAdapter,
    NequIPAtomsAdapter,
    SchNetPackAtomsAdapter,
    SevenNetAtomsAdapter,
)
from lightning_januspipe.calculator.skin import Edges, SkinNeighborList

__all__ = [
    "AtomsAdapter",
    "Edges",
    "JanusPipeCalculator",
    "MACEAtomsAdapter",
    "MatGLAtomsAdapter",
    "NequIPAtomsAdapter",
    "SchNetPackAtomsAdapter",
    "SevenNetAtomsAdapter",
    "SkinNeighborList",
    "StructureAdapter",
]
