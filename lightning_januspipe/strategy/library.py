"""Finds the modules of one Lightning that the strategy needs: of ``lightning`` or of ``pytorch_lightning``."""

from __future__ import annotations

import importlib
from typing import Any


class Library:
    """Holds the modules of one Lightning that the strategy uses.

    Args:
        namespace: ``"lightning"`` or ``"pytorch_lightning"``.
    """

    def __init__(self, namespace: str) -> None:
        both = namespace == "lightning"
        pytorch, fabric = ("lightning.pytorch", "lightning.fabric") if both else (namespace, "lightning_fabric")
        load: Any = importlib.import_module
        self.strategies = load(f"{pytorch}.strategies")
        self.callbacks = load(f"{pytorch}.callbacks")
        self.launcher = load(f"{pytorch}.strategies.launchers.subprocess_script")
        self.precision = load(f"{pytorch}.plugins.precision")
        self.profilers = load(f"{pytorch}.profilers")
        self.loggers = load(f"{pytorch}.loggers.logger")
        self.helpers = load(f"{pytorch}.utilities.model_helpers")
        self.data = load(f"{pytorch}.utilities.data")
        self.overrides = load(f"{pytorch}.overrides.distributed")
        self.rank_zero = load(f"{pytorch}.utilities.rank_zero")
        self.utils_rank_zero = load("lightning_utilities.core.rank_zero")
        self.distributed = load(f"{fabric}.utilities.distributed")
        self.seed = load(f"{fabric}.utilities.seed")
        self.cloud_io = load(f"{fabric}.utilities.cloud_io")
        self.torch_io = load(f"{fabric}.plugins.io.torch_io")
        self.wrapper = load(f"{pytorch}.plugins.io.wrapper")
