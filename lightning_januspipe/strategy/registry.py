"""Bind the strategy to the Lightnings that are installed, and register its names with them."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

from lightning_januspipe.strategy.strategy import UnboundStrategy

NAMESPACES = ("lightning", "pytorch_lightning")


def strategy_class(namespace: str = "lightning") -> type:
    """The strategy bound to ``"lightning"`` or ``"pytorch_lightning"``.

    The two are the same code under two names, with base classes and registries of their own; an instance of one is
    refused by the other.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: that Lightning is not installed.
    """
    if namespace not in NAMESPACES:
        raise ValueError(f"namespace={namespace!r}; expected one of {', '.join(NAMESPACES)}")
    return _bound(namespace)


class Library:
    """The modules of one Lightning that the strategy needs."""

    def __init__(self, namespace: str) -> None:
        both = namespace == "lightning"
        pytorch, fabric = ("lightning.pytorch", "lightning.fabric") if both else (namespace, "lightning_fabric")
        load = importlib.import_module
        self.strategies = load(f"{pytorch}.strategies")
        self.launcher = load(f"{pytorch}.strategies.launchers.subprocess_script")
        self.precision = load(f"{pytorch}.plugins.precision")
        self.profilers = load(f"{pytorch}.profilers")
        self.loggers = load(f"{pytorch}.loggers.logger")
        self.helpers = load(f"{pytorch}.utilities.model_helpers")
        self.rank_zero = load(f"{pytorch}.utilities.rank_zero")
        self.utils_rank_zero = load("lightning_utilities.core.rank_zero")
        self.distributed = load(f"{fabric}.utilities.distributed")
        self.seed = load(f"{fabric}.utilities.seed")
        self.cloud_io = load(f"{fabric}.utilities.cloud_io")
        self.torch_io = load(f"{fabric}.plugins.io.torch_io")
        self.wrapper = load(f"{pytorch}.plugins.io.wrapper")


@lru_cache
def _bound(namespace: str) -> type:
    library = Library(namespace)
    bases = (UnboundStrategy, library.strategies.ParallelStrategy)
    module = f"lightning_januspipe.{namespace}"  # which names it, in pickles and where a Trainer refuses the other's
    return type("JanusPipeStrategy", bases, {"lib": library, "__doc__": UnboundStrategy.__doc__, "__module__": module})


def register(namespace: str) -> None:
    """Register the strategy's names with one Lightning; twice is as good as once."""
    cls = strategy_class(namespace)
    registry = cls.lib.strategies.StrategyRegistry  # type: ignore[attr-defined]
    names: dict[str, dict[str, Any]] = {
        "januspipe": {},
        "januspipe_gpipe": {"schedule": "gpipe"},
        "januspipe_1f1b_2nd": {"schedule": "1f1b-2nd"},
        "januspipe_hanayo_2nd": {"schedule": "hanayo-2nd"},
    }
    for name, arguments in names.items():
        if name not in registry:
            registry.register(name, cls, description="Pipeline × data parallel training of potentials", **arguments)
