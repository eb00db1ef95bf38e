"""A Trainer for tests."""

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


def quiet_trainer(strategy: Any = None, namespace: str = "lightning", **arguments: Any) -> Any:
    """Returns a Trainer that runs on the CPU, prints, logs and saves nothing, and leaves the order of samples alone.

    Args:
        strategy: Arguments of :class:`~lightning_januspipe.JanusPipeStrategy` as a dict, for one rank of a
            :class:`~lightning_januspipe.testing.RankPool`; the job's size is read from the environment's WORLD_SIZE.
            None is plain Lightning in one process. Anything else is passed on to the Trainer.
        namespace: ``"lightning"`` or ``"pytorch_lightning"``: whose Trainer it is.
        arguments: Other arguments of the Trainer, which replace the quiet ones.

    Raises:
        ValueError: The namespace is another word.
        ModuleNotFoundError: That Lightning is not installed.
    """
    chosen: dict[str, Any] = {"strategy": "auto" if strategy is None else strategy}
    if strategy is None:
        chosen["devices"] = 1
    elif isinstance(strategy, Mapping):
        chosen = {"strategy": strategy_class(namespace)(**strategy), "devices": int(os.environ["WORLD_SIZE"])}
    return library(namespace).Trainer(**{**_QUIET, **chosen, **arguments})
