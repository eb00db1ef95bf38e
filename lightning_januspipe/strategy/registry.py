"""Registers the strategy's names in every Lightning that is installed, and makes the class that is bound to each.

Nothing here imports torch or a Lightning before the strategy is used: the names wait for the import of a Lightning's
strategies, and the class is made when it is asked for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMESPACES = ("lightning", "pytorch_lightning")

_STRATEGIES = {"lightning.pytorch.strategies": "lightning", "pytorch_lightning.strategies": "pytorch_lightning"}
"""The module that holds the registry of each Lightning."""

_NAMES: dict[str, dict[str, str]] = {
    "januspipe": {},
    "januspipe_gpipe": {"schedule": "gpipe"},
    "januspipe_1f1b_2nd": {"schedule": "1f1b-2nd"},
    "januspipe_hanayo_2nd": {"schedule": "hanayo-2nd"},
}
"""The names for ``Trainer(strategy=...)``, and the arguments that each stands for."""


def strategy_class(namespace: str = "lightning") -> type:
    """Returns the strategy bound to ``"lightning"`` or ``"pytorch_lightning"``.

    The two are the same code under two names, with base classes and registries of their own; an instance of one is
    refused by the other.

    Raises:
        ValueError: Another name was given.
        ModuleNotFoundError: That Lightning is not installed.
    """
    if namespace not in NAMESPACES:
        raise ValueError(f"namespace={namespace!r}; expected one of {', '.join(NAMESPACES)}")
    return _bound(namespace)


@lru_cache
def _bound(namespace: str) -> type:
    from lightning_januspipe.strategy.library import Library
    from lightning_januspipe.strategy.options import arguments_section
    from lightning_januspipe.strategy.strategy import UnboundStrategy

    library = Library(namespace)
    bases = (UnboundStrategy, library.strategies.ParallelStrategy)
    module = f"lightning_januspipe.{namespace}"  # a module that has it, for pickles and for a Trainer's errors
    explained = f"{inspect.getdoc(UnboundStrategy)}\n\n{arguments_section()}"
    return type("JanusPipeStrategy", bases, {"lib": library, "__doc__": explained, "__module__": module})


def _make(namespace: str, **arguments: Any) -> Any:
    return strategy_class(namespace)(**arguments)


def register_everywhere() -> None:
    """Registers the strategy's names with every Lightning: now if it is imported, else right after its import."""
    if not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())
    for name, namespace in _STRATEGIES.items():
        if name in sys.modules:
            _register(namespace, sys.modules[name])


def _register(namespace: str, strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    for name, arguments in _NAMES.items():
        if name not in registry:
            description = "Pipeline × data × graph parallel training of interatomic potentials"
            registry.register(name, partial(_make, namespace), description=description, **arguments)


class _RegisteringFinder(MetaPathFinder):
    """Finds a Lightning's strategies as the other finders do, and registers the names when they have been run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _STRATEGIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register(_STRATEGIES[fullname], module)

            vars(spec.loader)["exec_module"] = exec_module
        return spec
