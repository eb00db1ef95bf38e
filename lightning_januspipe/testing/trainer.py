"""Makes a Trainer for tests."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from lightning_januspipe.strategy.registry import NAMESPACES, strategy_class

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # Lightning's sampler shuffles
}


def library(namespace: str = "lightning") -> Any:
    """Returns the module ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        ValueError: The namespace is another word.
        ModuleNotFoundError: That Lightning is not installed.
    """
    if namespace not in NAMESPACES:
        raise ValueError(f"namespace={namespace!r}; expected one of {', '.join(NAMESPACES)}")
    return importlib.import_module("lightning.pytorch" if namespace == "lightning" else namespace)


def namespace_of(module: Any) -> str:
    """Returns the name of the Lightning that a module is of."""
    names = [c.__module__.split(".")[0] for c in type(module).__mro__]
    return "lightning" if "lightning" in names else "pytorch_lightning"


def quiet_trainer(strategy: Any = None, namespace: str = "lightning", **arguments: Any) -> Any:
    """Returns a Trainer that runs on the CPU, prints, logs and saves nothing, and leaves the order of samples alone.

    Args:
        strategy: Arguments of :class:`~lightning_januspipe.JanusPipeStrategy` as a dict, or a name or object that the
            Trainer takes. The number of processes is the environment's WORLD_SIZE, which a
            :class:`~lightning_januspipe.testing.RankPool` sets. None is plain Lightning in one process.
        namespace: ``"lightning"`` or ``"pytorch_lightning"``: whose Trainer it is.
        arguments: Other arguments of the Trainer, which replace the quiet ones.

    Raises:
        ValueError: The namespace is another word.
        ModuleNotFoundError: That Lightning is not installed.
    """
    bound = strategy_class(namespace)(**strategy) if isinstance(strategy, Mapping) else strategy or "auto"
    devices = 1 if strategy is None else int(os.environ.get("WORLD_SIZE", "1"))
    return library(namespace).Trainer(**{**_QUIET, "strategy": bound, "devices": devices, **arguments})
