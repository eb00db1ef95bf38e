"""Makes the batches of potentials of other packages, which it knows by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_januspipe.calculator.adapter import AtomsAdapter
from lightning_januspipe.calculator.packages.of_aimnet import AIMNet2AtomsAdapter
from lightning_januspipe.calculator.packages.of_mace import MACEAtomsAdapter
from lightning_januspipe.calculator.packages.of_matgl import MatGLAtomsAdapter
from lightning_januspipe.calculator.packages.of_matris import CHGNetAtomsAdapter, MatRISAtomsAdapter
from lightning_januspipe.calculator.packages.of_metatrain import PETAtomsAdapter
from lightning_januspipe.calculator.packages.of_nequip import NequIPAtomsAdapter
from lightning_januspipe.calculator.packages.of_pyg import PyGAtomsAdapter
from lightning_januspipe.calculator.packages.of_schnetpack import SchNetPackAtomsAdapter
from lightning_januspipe.calculator.packages.of_sevennet import SevenNetAtomsAdapter
from lightning_januspipe.calculator.packages.of_torchmdnet import TorchMDNetAtomsAdapter

__all__ = [
    "AIMNet2AtomsAdapter",
    "CHGNetAtomsAdapter",
    "MACEAtomsAdapter",
    "MatGLAtomsAdapter",
    "MatRISAtomsAdapter",
    "NequIPAtomsAdapter",
    "PETAtomsAdapter",
    "PyGAtomsAdapter",
    "SchNetPackAtomsAdapter",
    "SevenNetAtomsAdapter",
    "TorchMDNetAtomsAdapter",
    "known_potential",
]

_OF_CLASSES: Mapping[tuple[str, str], type[Any]] = {
    ("mace", "MACE"): MACEAtomsAdapter,
    ("nequip", "GraphModel"): NequIPAtomsAdapter,
    ("schnetpack", "NeuralNetworkPotential"): SchNetPackAtomsAdapter,
    ("matgl", "Potential"): MatGLAtomsAdapter,
    ("sevenn", "AtomGraphSequential"): SevenNetAtomsAdapter,
    ("torchmdnet", "TorchMD_Net"): TorchMDNetAtomsAdapter,
    ("aimnet", "AIMNet2"): AIMNet2AtomsAdapter,
    ("metatrain", "PET"): PETAtomsAdapter,
    ("chgnet", "CHGNet"): CHGNetAtomsAdapter,
    ("matris", "MatRIS"): MatRISAtomsAdapter,
    ("torch_geometric", "ViSNet"): PyGAtomsAdapter,
    ("torch_geometric", "DimeNetPlusPlus"): PyGAtomsAdapter,
}
"""Adapters by the package and the name of a class of potentials."""


def known_potential(module: nn.Module) -> tuple[nn.Module, AtomsAdapter] | None:
    """Returns the outermost potential of a known package in a module, with its adapter; None if there is none."""
    for part in module.modules():
        for of in type(part).__mro__:
            adapter = _OF_CLASSES.get((of.__module__.partition(".")[0], of.__name__))
            if adapter is not None:
                return part, adapter(part)
    return None
