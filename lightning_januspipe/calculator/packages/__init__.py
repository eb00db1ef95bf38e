"""Makes the batches of potentials of other packages, which it knows by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_januspipe.calculator.adapter import AtomsAdapter
from lightning_januspipe.calculator.packages.of_aimnet import AIMNet2AtomsAdapter
from lightning_januspipe.calculator.packages.of_fairchem import FairchemAtomsAdapter
from lightning_januspipe.calculator.packages.of_mace import MACEAtomsAdapter
from lightning_januspipe.calculator.packages.of_matgl import MatGLAtomsAdapter
from lightning_januspipe.calculator.packages.of_matris import CHGNetAtomsAdapter, MatRISAtomsAdapter
from lightning_januspipe.calculator.packages.of_mattersim import MatterSimAtomsAdapter
from lightning_januspipe.calculator.packages.of_metatrain import PETAtomsAdapter
from lightning_januspipe.calculator.packages.of_nequip import NequIPAtomsAdapter
from lightning_januspipe.calculator.packages.of_nequix import NequixAtomsAdapter
from lightning_januspipe.calculator.packages.of_newtonnet import NewtonNetAtomsAdapter
from lightning_januspipe.calculator.packages.of_orb import OrbAtomsAdapter
from lightning_januspipe.calculator.packages.of_pyg import PyGAtomsAdapter
from lightning_januspipe.calculator.packages.of_schnetpack import SchNetPackAtomsAdapter
from lightning_januspipe.calculator.packages.of_sevennet import SevenNetAtomsAdapter
from lightning_januspipe.calculator.packages.of_torchmdnet import TorchMDNetAtomsAdapter

__all__ = [
    "AIMNet2AtomsAdapter",
    "CHGNetAtomsAdapter",
    "FairchemAtomsAdapter",
    "MACEAtomsAdapter",
    "MatGLAtomsAdapter",
    "MatRISAtomsAdapter",
    "MatterSimAtomsAdapter",
    "NequIPAtomsAdapter",
    "NequixAtomsAdapter",
    "NewtonNetAtomsAdapter",
    "OrbAtomsAdapter",
    "PETAtomsAdapter",
    "PyGAtomsAdapter",
    "SchNetPackAtomsAdapter",
    "SevenNetAtomsAdapter",
    "TorchMDNetAtomsAdapter",
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
    ("torch_geometric", "DimeNet"): PyGAtomsAdapter,
    ("torch_geometric", "SchNet"): PyGAtomsAdapter,
    ("fairchem", "HydraModel"): FairchemAtomsAdapter,
    ("fairchem", "HydraModelV2"): FairchemAtomsAdapter,
    ("orb_models", "ConservativeForcefieldRegressor"): OrbAtomsAdapter,
    ("mattersim", "M3Gnet"): MatterSimAtomsAdapter,
    ("newtonnet", "NewtonNet"): NewtonNetAtomsAdapter,
    ("nequix", "NequixTorch"): NequixAtomsAdapter,
}
"""Adapters by the package and the name of a class of potentials."""


def known_potential(module: nn.Module) -> tuple[nn.Module, AtomsAdapter] | None:
    """Returns the outermost potential of a known package in a module, with its adapter; None if there is none."""
    for part in module.modules():
        adapter = _adapter_class(part)
        if adapter is not None:
            return part, adapter(part)
    return None


def potential_of(module: nn.Module, adapter: AtomsAdapter) -> nn.Module:
    """Returns the outermost potential in a module that is of the package of an adapter; else the module."""
    of_package = (part for part in module.modules() if _adapter_class(part) in type(adapter).__mro__)
    return next(of_package, module)


def _adapter_class(part: nn.Module) -> type[Any] | None:
    """Returns the class of the adapter for a potential of a known package; None for other modules."""
    names = ((of.__module__.partition(".")[0], of.__name__) for of in type(part).__mro__)
    return next((_OF_CLASSES[name] for name in names if name in _OF_CLASSES), None)
