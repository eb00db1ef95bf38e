"""Pipeline × data parallel training of machine-learning interatomic potentials, as a strategy of PyTorch Lightning.

Importing this package registers ``Trainer(strategy="januspipe")`` with every Lightning that is installed.
"""

from importlib.util import find_spec

from lightning_januspipe.capture import Adapter, ExplicitStages, run_stages
from lightning_januspipe.graph import with_halo
from lightning_januspipe.strategy.registry import NAMESPACES, register, strategy_class

__version__ = "0.1.0"

_installed = [n for n in NAMESPACES if find_spec(n) is not None]
if not _installed:
    raise ModuleNotFoundError("lightning_januspipe needs lightning or pytorch_lightning: pip install lightning")
for _namespace in _installed:
    register(_namespace)
JanusPipeStrategy = strategy_class(_installed[0])

__all__ = ["Adapter", "ExplicitStages", "JanusPipeStrategy", "run_stages", "strategy_class", "with_halo"]
