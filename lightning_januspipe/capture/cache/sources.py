"""Code as a trace sees it: where a function or class comes from, what its code is, and which globals it reads."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_OWN = __name__.partition(".")[0]

LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})

FRAMEWORKS = LIGHTNING | {
    *("torch", "torchgen", "functorch", "triton", "torchmetrics", "lightning_utilities", "numpy", "scipy", "sympy"),
    *("pandas", "ase", "pymatgen", "hydra", "omegaconf", "wandb", "matplotlib", "typing_extensions"),
}
"""Packages that are told apart by their version alone: large, and no place for a model's own forward."""


def root_of(module: str | None) -> str:
    """Top-level package of a dotted name; a spawned process's ``__mp_main__`` is the script too."""
    root = (module or "").partition(".")[0]
    return "__main__" if root == "__mp_main__" else root


class Origin(Enum):
    """Whose code something is: it decides how closely it is looked at.

    Attributes:
        FRAMEWORK: Python and large libraries; a version says what they do.
        INSTALLED: packages that nobody edits while working on a model.
        USER: the user's own files, scripts and notebooks.
    """

    FRAMEWORK = "framework"
    INSTALLED = "installed"
    USER = "user"


def origin_of(root: str) -> Origin:
    """Whose a top-level package is; a user's file may have the name of a module of Python's."""
    file = _file_of(root)
    if root in FRAMEWORKS:
        return Origin.FRAMEWORK
    if root in sys.stdlib_module_names or root in ("", "builtins"):
        paths = [*(sysconfig.get_path(n) for n in ("stdlib", "platstdlib")), str(Path(os.__file__).parent)]
        if file is None or any(file.is_relative_to(p) for p in paths):
            return Origin.FRAMEWORK
    installed = file is not None and not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    return Origin.INSTALLED if installed or root == _OWN else Origin.USER


def _file_of(root: str) -> Path | None:
    module = sys.modules.get(root)
    places = [getattr(module, "__file__", None), *list(getattr(module, "__path__", ()))]
    return next((Path(p) for p in places if p), None)


def version_of(root: str) -> str:
    """Version that a loaded package gives itself, or nothing."""
    return str(getattr(sys.modules.get(root), "__version__", ""))


def loaded_modules(package: str) -> Iterator[tuple[str, ModuleType]]:
    """Names and modules of a package, or of the script, that are loaded, in the order of their names.

    Args:
        package: dotted name; of ``__main__`` those of the package that the script was started from, too.
    """
    started = root_of(getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None))
    roots = {package, "__mp_main__", started} - {""} if package == "__main__" else {package}
    inside = tuple(f"{root}." for root in roots)
    seen: set[int] = set()
    for name in sorted(n for n in list(sys.modules) if n in roots or n.startswith(inside)):
        module = sys.modules.get(name)
        if isinstance(module, ModuleType) and id(module) not in seen:
            seen.add(id(module))
            yield name.replace("__mp_main__", "__main__"), module


def source_of(module: ModuleType) -> bytes:
    """The content of a module's file; compiled extensions, which may be large, count by size and time of change."""
    file = Path(getattr(module, "__file__", None) or "")
    if not file.is_file():
        return b""
    if file.suffix in (".py", ".pyc"):
        return file.read_bytes()
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}".encode()


def is_importable(value: Any) -> bool:
    """Whether a function or class is what its module and name say."""
    found: Any = sys.modules.get(value.__module__ or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def functions_in(value: Any) -> list[FunctionType]:
    """The functions that make up an attribute of a class, or none."""
    if isinstance(value, FunctionType):
        return [value]
    if isinstance(value, (staticmethod, classmethod)):
        return functions_in(value.__func__)
    if isinstance(value, property):
        return [f for part in (value.fget, value.fset, value.fdel) for f in functions_in(part)]
    if isinstance(value, functools.cached_property):
        return functions_in(value.func)
    return []


class Codes:
    """Digests of code objects and the names that they read, each found once."""

    def __init__(self) -> None:
        self._digests: dict[CodeType, bytes] = {}
        self._names: dict[CodeType, frozenset[str]] = {}
        self._classes: dict[type, bytes] = {}

    def digest(self, code: CodeType) -> bytes:
        """What a code object does, wherever it stands: neither file nor line counts."""
        if code not in self._digests:
            hasher = hashlib.sha256()
            hasher.update(repr((code.co_name, code.co_flags, code.co_argcount, code.co_posonlyargcount)).encode())
            hasher.update(repr((code.co_kwonlyargcount, code.co_names, code.co_varnames)).encode())
            hasher.update(repr((code.co_freevars, code.co_cellvars, code.co_code)).encode())
            hasher.update(getattr(code, "co_exceptiontable", b""))
            hasher.update(self._constant(code.co_consts))
            self._digests[code] = hasher.digest()
        return self._digests[code]

    def _constant(self, value: Any) -> bytes:
        if isinstance(value, CodeType):
            return self.digest(value)
        if isinstance(value, (tuple, frozenset)):
            parts = [self._constant(v) for v in value]
            text = type(value).__name__.encode() + b"".join(parts if isinstance(value, tuple) else sorted(parts))
        else:
            text = f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(text).digest()

    def names(self, code: CodeType) -> frozenset[str]:
        """Globals and attributes that a code object and those inside it name."""
        if code not in self._names:
            inner = (self.names(c) for c in code.co_consts if isinstance(c, CodeType))
            self._names[code] = frozenset(code.co_names).union(*inner)
        return self._names[code]

    def class_digest(self, cls: type) -> bytes:
        """The code of all of a class's own functions."""
        if cls not in self._classes:
            hasher = hashlib.sha256()
            for name, value in sorted(vars(cls).items()):
                for function in functions_in(value):
                    hasher.update(f"{name} {function.__qualname__} ".encode() + self.digest(function.__code__))
            self._classes[cls] = hasher.digest()
        return self._classes[cls]

    def module_digest(self, module: ModuleType) -> bytes:
        """The code of all functions and classes that a module defines, as it was loaded."""
        hasher = hashlib.sha256()
        for name, value in sorted(vars(module).items()):
            if getattr(value, "__module__", None) == module.__name__:
                for function in functions_in(value):
                    hasher.update(f"{name} ".encode() + self.digest(function.__code__))
                if isinstance(value, type):
                    hasher.update(f"{name} ".encode() + self.class_digest(value))
        return hasher.digest()
