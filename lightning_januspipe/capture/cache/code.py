"""Finds the code behind a model, as it is loaded and as it stands in files, and makes digests of it."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_FRAMEWORKS = frozenset(
    {
        *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "builtins", ""),
        *("torch", "torchgen", "functorch", "triton", "numpy", "scipy", "sympy", "pandas", "ase", "pymatgen", "rich"),
        *("hydra", "omegaconf", "wandb", "matplotlib", "typing_extensions", "lightning_januspipe"),
        *("pytest", "_pytest", "pluggy", "hypothesis"),  # Hypothesis counts the seconds of garbage collections
    }
)
"""Packages whose version alone counts, as Python's does: large, and no model's own forward is there."""


def root_of(value: Any) -> str:
    """Returns the top-level package of a module, class, function or other object; the script is ``__main__``."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    root = (name if isinstance(name, str) else type(value).__module__).partition(".")[0]
    return "__main__" if root == "__mp_main__" else root  # as a spawned process calls it


@functools.lru_cache(maxsize=512)
def is_framework(root: str) -> bool:
    """Tells whether the version of a top-level package says what its code does."""
    file = getattr(sys.modules.get(root), "__file__", None)  # a user's file may have the name of one of Python's
    is_pythons = file is None or Path(file).is_relative_to(Path(os.__file__).parent)
    return root in _FRAMEWORKS or (root in sys.stdlib_module_names and is_pythons)


def code_of(roots: set[str], digest: Callable[[Any], str]) -> Iterator[str]:
    """Yields digests of the code of packages, and of the packages that their code refers to.

    The digest of a loaded module covers its file, the code of its functions and classes, and the globals that this code
    names: the type of a global that has no digest, and in installed packages only numbers and text.

    Args:
        roots: top-level packages; gets those that are found.
        digest: makes the digest of any value.
    """
    done: set[str] = set()
    while roots - done:
        root = min(roots - done)
        done.add(root)
        yield f"{root} {getattr(sys.modules.get(root), '__version__', '')}"
        inside = {root, "__mp_main__"} if root == "__main__" else {root}
        loaded = sorted((n, m) for n, m in list(sys.modules.items()) if n.partition(".")[0] in inside)
        for name, module in () if is_framework(root) else loaded:
            file = Path(getattr(module, "__file__", None) or "")
            code = [described(f.__code__) for f in functions_in(module)]
            parts: list[Any] = [
                name.replace("__mp_main__", "__main__"),
                file.suffix == ".py" and file.is_file() and file.read_bytes(),
                code,
            ]
            is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
            for key in sorted(vars(module).keys() & {n for _, names in code for n in names}):
                value = vars(module)[key]
                roots.add(root_of(value))
                if not is_installed or isinstance(value, (bool, int, float, str)):
                    try:
                        parts += [key, digest(value)]
                    except Exception:  # connections, decoders and the like, which no trace depends on
                        parts += [key, type(value)]
            yield digest(parts)


def functions_in(owner: Any) -> Iterator[FunctionType]:
    """Yields the functions that a module or class holds in the order of their names, and a module's own methods."""
    for _, value in sorted(vars(owner).items()):
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        value = value.func if isinstance(value, functools.cached_property) else value
        for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
            if isinstance(part, (FunctionType, functools._lru_cache_wrapper)):
                yield from (f for f in dict.fromkeys((part, unwrap(part))) if isinstance(f, FunctionType))
        if isinstance(value, type) and isinstance(owner, ModuleType) and value.__module__ == owner.__name__:
            yield from functions_in(value)


@functools.lru_cache(maxsize=65536)
def described(code: CodeType) -> tuple[str, tuple[str, ...]]:
    """Returns a digest of what a code object does, wherever it stands, and the globals and attributes that it names."""
    inner = [described(c) for c in code.co_consts if isinstance(c, CodeType)]
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    parts = (
        *(code.co_name, code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_code, code.co_names),
        *(code.co_varnames, code.co_freevars, code.co_cellvars, [digest for digest, _ in inner]),
        [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c) for c in constants],
    )
    names = sorted({*code.co_names, *(name for _, named in inner for name in named)})
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest(), tuple(names)
