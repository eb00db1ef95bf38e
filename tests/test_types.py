"""What the type checker is told about the package: few exemptions, and every override of a Lightning hook is marked."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lightning_januspipe

ROOT = Path(lightning_januspipe.__path__[0])
MOST_IGNORED = 15
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def test_few_lines_are_hidden_from_the_type_checker() -> None:
    hidden = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in ROOT.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "type: ignore" in line
    ]
    assert len(hidden) <= MOST_IGNORED, hidden


def unmarked(cls: type, bound: type | None = None) -> list[str]:
    """Methods and properties of a class that override those of a Lightning, and do not say so.

    Args:
        cls: the class.
        bound: a class derived from it that has the bases of a Lightning, where it has them later.
    """
    bases = [base for base in (bound or cls).__mro__[1:] if base.__module__.split(".")[0] in LIGHTNING]
    found = []
    for name, value in vars(cls).items():
        function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        is_override = callable(function) and name != "__init__" and any(name in vars(base) for base in bases)
        if is_override and not any(getattr(f, "__override__", False) for f in (function, value)):
            found.append(f"{cls.__module__}.{cls.__qualname__}.{name}")
    return found


def modules() -> list[str]:
    """Names of all modules of the package."""
    found = pkgutil.walk_packages([str(ROOT)], f"{lightning_januspipe.__name__}.")
    left_out = {"__main__", *(() if find_spec("metatomic") else ("metatomic_model",))}  # whose package may be missing
    return [module.name for module in found if module.name.rpartition(".")[2] not in left_out]


def test_every_override_of_a_lightning_hook_is_marked() -> None:
    """A hook that a later Lightning renames is then found by the type checker, not by a run without it."""
    pytest.importorskip("lightning")
    strategy = lightning_januspipe.strategy_class("lightning")
    classes = {c for name in modules() for c in vars(importlib.import_module(name)).values() if inspect.isclass(c)}
    own = [cls for cls in classes if cls.__module__.startswith(f"{lightning_januspipe.__name__}.")]
    parts = {*strategy.__mro__} & {*own}
    assert len(parts) >= 5, "the strategy is made of several"
    assert not [line for cls in own for line in unmarked(cls, strategy if cls in parts else None)]


def test_an_unmarked_override_is_found() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Forgetful(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...

        def own(self) -> None: ...

    assert [line.rpartition(".")[2] for line in unmarked(Forgetful)] == ["on_train_start"]
