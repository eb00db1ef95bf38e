"""Trains machine-learning interatomic potentials with pipeline × data × graph parallelism, as a strategy of Lightning.

Importing this package registers ``Trainer(strategy="januspipe")`` with every Lightning that is installed, whether that
is imported before or after. Torch, Lightning and the package's own modules are imported when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_januspipe.strategy.registry import NAMESPACES, register_everywhere, strategy_class

if TYPE_CHECKING:
    from lightning_januspipe.capture import Adapter, ExplicitStages, run_stages
    from lightning_januspipe.graph import with_halo
    from lightning_januspipe.models import load

    JanusPipeStrategy: Any

__version__ = "0.1.0"

_installed = [n for n in NAMESPACES if find_spec(n) is not None]
if not _installed:
    raise ModuleNotFoundError("lightning_januspipe needs lightning or pytorch_lightning: pip install lightning")
register_everywhere()

__all__ = ["Adapter", "ExplicitStages", "JanusPipeStrategy", "load", "run_stages", "strategy_class", "with_halo"]

_WHERE = {
    **dict.fromkeys(("Adapter", "ExplicitStages", "run_stages"), "capture"),
    **{"load": "models", "with_halo": "graph"},
}
_FOLDERS = ("bench", "calculator", "callbacks", "data", "experts", "models", "plan", "schedule", "testing")


def __getattr__(name: str) -> Any:
    if name == "JanusPipeStrategy":
        value: Any = strategy_class(_installed[0])
    elif name in _WHERE:
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
