"""Runs a trained potential as a calculator of ASE: molecular dynamics, relaxations and single points."""

from lightning_januspipe.calculator.adapter import AtomsAdapter, StructureAdapter
from lightning_januspipe.calculator.calculator import JanusPipeCalculator
from lightning_januspipe.calculator.packages import (
    AIMNet2AtomsAdapter,
    CHGNetAtomsAdapter,
    MACEAtomsAdapter,
    MatGLAtomsAdapter,
    MatRISAtomsAdapter,
    NequIPAtomsAdapter,
    PETAtomsAdapter,
    PyGAtomsAdapter,
    SchNetPackAtomsAdapter,
    SevenNetAtomsAdapter,
    TorchMDNetAtomsAdapter,
)
from lightning_januspipe.calculator.skin import Edges, SkinNeighborList

__all__ = [
    "AIMNet2AtomsAdapter",
    "AtomsAdapter",
    "CHGNetAtomsAdapter",
    "Edges",
    "JanusPipeCalculator",
    "MACEAtomsAdapter",
    "MatGLAtomsAdapter",
    "MatRISAtomsAdapter",
    "NequIPAtomsAdapter",
    "PETAtomsAdapter",
    "PyGAtomsAdapter",
    "SchNetPackAtomsAdapter",
    "SevenNetAtomsAdapter",
    "SkinNeighborList",
    "StructureAdapter",
    "TorchMDNetAtomsAdapter",
]
