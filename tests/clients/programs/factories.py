"""Modules and data of the programs in this folder, as functions that ranks can import."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


def module_of(program: str, *options: str) -> Callable[[], Any]:
    """Returns a function that makes the LightningModule that a program trains with these options."""
    return partial(_made, program, "make_module", options)


def data_of(program: str, *options: str) -> Callable[[], Any]:
    """Returns a function that makes the data that a program trains on with these options."""
    return partial(_made, program, "make_data", options)


def factory(module: str, function: str) -> Callable[[], Any]:
    """Returns a function that calls one of a module in this folder, which is not imported before."""
    return partial(_called, module, function)


class Loader:
    """Has a loader as a data module has it.

    Args:
        loader: The loader of training batches.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        return self._loader


def _made(program: str, function: str, options: tuple[str, ...]) -> Any:
    module = import_module(program)
    args = module.arguments([*options, "--out", str(Path(mkdtemp(prefix="januspipe-client-")) / "out.pt")])
    return getattr(module, function)(args)


def _called(module: str, function: str) -> Any:
    return getattr(import_module(module), function)()
