"""A digest of any value and of all code behind it, which is the same in another process.

It looks at what pickle would keep. Where it cannot be made sure that two values are alike, there is no digest.
"""

from __future__ import annotations

import contextvars
import copyreg
import functools
import hashlib
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from lightning_januspipe.capture.cache.sources import (
    Codes,
    Origin,
    functions_in,
    is_importable,
    loaded_modules,
    origin_of,
    root_of,
    source_of,
    version_of,
)

_MOST_VALUES = 500_000

_SCALARS: frozenset[Any] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)}
)
_TORCH_NAMES: tuple[type, ...] = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)


class NotDetermined(Exception):
    """A value of which nothing says whether it is the same in another process."""


def name_of(cls: Any) -> str:
    """Module and name of a class or function."""
    return f"{cls.__module__}.{cls.__qualname__}".replace("__mp_main__", "__main__")


class Digester:
    """Writes values into a hash; equal values give equal digests in every process.

    Tensors and arrays count by value; objects by class and by what pickle would keep; functions by name where torch or
    Python has them, else by code, defaults and closures. Of the user's own classes and functions the globals that they
    read count too (by type alone what pickle refuses), of installed packages the plain ones (numbers and text), and of
    both all files of the package that are loaded. Dicts count in their order, which code may follow; sets without.

    Raises:
        NotDetermined: (by all methods) a value cannot be told apart; :attr:`path` says where it was found.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._codes = Codes()
        self._memo: dict[int, int] = {}
        self._kept: list[Any] = []  # what the memo knows stays alive, so that its ids stay its own
        self._path: list[str] = []
        self._count = 0
        self._origins: dict[str, Origin] = {}
        self._tokens: dict[type, bytes] = {}
        self._classes: dict[type, bool] = {}  # whether the body is written
        self._globals: dict[tuple[str, str, int], Any] = {}
        self._done: set[Any] = set()

    @property
    def path(self) -> str:
        """Where the value was found at which the digest stopped."""
        return "".join(self._path).lstrip(".")

    def add(self, value: Any, at: str = "") -> None:
        """One value, and all that it holds.

        Args:
            value: anything.
            at: where it stands, for the message of an error.
        """
        kind = type(value)
        self._count += 1
        if self._count > _MOST_VALUES:
            raise NotDetermined(f"more than {_MOST_VALUES} values were found in it and what it holds")
        if kind in _SCALARS:
            self._write(kind.__name__, repr(value))
            return
        self._path.append(at)
        self._add(value, kind)
        self._path.pop()

    def add_package(self, package: str, as_loaded: bool = True) -> None:
        """All modules of a package that are loaded.

        Args:
            package: its dotted name.
            as_loaded: by their code too, for files that may have been edited since.
        """
        for name, module in loaded_modules(package):
            self._write("loaded", name, source_of(module))
            if as_loaded:
                self._write(self._codes.module_digest(module))

    def finish(self) -> str:
        """All code behind what was added; then the digest in hexadecimal digits."""
        while True:
            classes = [c for c, written in self._classes.items() if not written]
            if not classes and not self._globals:
                break
            for cls in sorted(classes, key=lambda c: (name_of(c), self._codes.class_digest(c))):
                self._classes[cls] = True
                self._class_body(cls)
            values, self._globals = self._globals, {}
            for module, name, scope in sorted(values, key=lambda key: key[:2]):
                self._global(module, name, values[module, name, scope])
        for root, origin in sorted(self._origins.items(), key=lambda item: item[0]):
            self._write("package", root, version_of(root))
            if origin is not Origin.FRAMEWORK:
                self.add_package(root, as_loaded=origin is Origin.USER)
        return self._hash.hexdigest()

    # for subclasses

    def label(self, value: Any) -> str | None:
        """A name that stands for a value, which is then not looked into."""
        return None

    def _special(self, value: Any) -> bool:
        """Write a value in a way of its own; whether it was."""
        return False

    # values

    def _add(self, value: Any, kind: Any) -> None:
        label = self.label(value)
        if label is not None:
            self._write("known", label)
        elif kind in (tuple, torch.Size):
            self._items(kind.__name__, value)
        elif kind in (set, frozenset):
            self._write(kind.__name__, str(len(value)), *sorted(self._digest_of(item) for item in value))
        elif isinstance(value, _TORCH_NAMES):
            self._write(kind.__name__, str(value))
        elif isinstance(value, types.ModuleType):
            self._write("module of Python", value.__name__)
            self._origin(value.__name__)
        elif id(value) in self._memo:
            self._write("again", str(self._memo[id(value)]))
        else:
            self._memo[id(value)] = len(self._memo)
            self._kept.append(value)
            self._object(value, kind)

    def _object(self, value: Any, kind: Any) -> None:
        if self._special(value):
            pass
        elif kind is list:
            self._items("list", value)
        elif kind in (dict, OrderedDict, types.MappingProxyType):
            self._mapping(kind.__name__, value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._write("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self._write("built in", value.__qualname__)
            self.add(value.__self__)
        elif isinstance(value, (types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType)):
            self._write("descriptor", name_of(value.__objclass__), value.__name__)
        elif isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            self._items(kind.__name__, functions_in(value))
        elif isinstance(value, functools.partial):
            self._write("partial")
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, CustomOpDef):
            self._write(str(value))
            self.add(value._init_fn)
        elif isinstance(value, Enum):
            self._class(kind)
            self._write(str(value.name))
            self.add(value.value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._write("array", name_of(kind), str(value.dtype.descr), str(value.shape), value.tobytes())
        elif isinstance(value, contextvars.ContextVar):
            self._write("variable", value.name)
            with suppress(LookupError):  # neither set nor with a default
                self.add(value.get())
        elif isinstance(value, weakref.ref):
            self._write("reference")
            self.add(value())
        else:
            self._reduced(value, kind)

    def _items(self, kind: str, values: Any) -> None:
        self._write(kind, str(len(values)))
        for index, value in enumerate(values):
            self.add(value, f"[{index}]")

    def _mapping(self, kind: str, values: Mapping[Any, Any]) -> None:
        """Entries in their order, which a forward may follow."""
        self._write(kind, str(len(values)))
        for key, value in values.items():
            self.add(key)
            self.add(value, f"[{key!r}]" if type(key) in _SCALARS else "[...]")

    def _tensor(self, value: Tensor) -> None:
        self._class(type(value))
        self._write("tensor", description(value))
        self.add(vars(value))
        if not value.is_meta:
            self._write(content_of(value))

    def _reduced(self, value: Any, kind: Any) -> None:
        """What pickle would keep of an object."""
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:
            raise NotDetermined(f"it is a {name_of(kind)}, which cannot be pickled ({error})") from error
        self._class(kind)
        if isinstance(parts, str):  # the name of a global
            self._write("global", parts)
            self.add(getattr(value, "__wrapped__", None))
            return
        function, arguments, state, items, entries = (*parts, None, None, None)[:5]
        self.add(function)
        self.add(arguments)
        if type(state) is dict:
            self._attributes(state)
        else:
            self.add(state)
        self.add(None if items is None else list(items))
        self.add(None if entries is None else list(entries))

    def _attributes(self, state: Mapping[str, Any]) -> None:
        self._write("attributes", str(len(state)))
        for name in sorted(state, key=str):
            self._write(str(name))
            self.add(state[name], f".{name}")

    # code

    def _origin(self, module: str | None) -> Origin:
        root = root_of(module)
        if root not in self._origins:
            self._origins[root] = origin_of(root)
        return self._origins[root]

    def _function(self, function: Any) -> None:
        self._write("function", name_of(function))
        origin = self._origin(function.__module__)
        if origin is not Origin.USER and is_importable(function):
            if origin is Origin.INSTALLED:
                self._plain_function(function)
            return
        self._write(self._codes.digest(function.__code__))
        self.add(function.__defaults__)
        self.add(function.__kwdefaults__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                self._write("empty")
            else:
                self.add(content, f" of which the variable {name}")
        self.add(vars(function))
        self._read_globals(function)

    def _plain_function(self, function: types.FunctionType) -> None:
        """A function of an installed package, whose sources say the most: its code and the plain globals it reads."""
        self._write(name_of(function), self._codes.digest(function.__code__))
        if function.__code__ not in self._done:
            self._done.add(function.__code__)
            self._read_globals(function)

    def _read_globals(self, function: Any) -> None:
        names, own = self._codes.names(function.__code__), str(function.__globals__.get("__name__"))
        scopes = [] if self._origin(own) is Origin.FRAMEWORK else [(own, function.__globals__)]
        seen = set()
        while scopes:
            module, scope = scopes.pop()
            seen.add(id(scope))
            for name in names.intersection(scope):
                value, key = scope[name], (module, name, id(scope))
                if isinstance(value, types.ModuleType):
                    if self._origin(value.__name__) is not Origin.FRAMEWORK and id(vars(value)) not in seen:
                        scopes.append((value.__name__, vars(value)))
                elif key not in self._done:
                    self._done.add(key)
                    self._globals[key] = value

    def _global(self, module: str, name: str, value: Any) -> None:
        self._write("global", module.replace("__mp_main__", "__main__"), name)
        depth = len(self._path)
        self._path.append(f"the global {module}.{name}, which its code reads")
        if self._origin(module) is Origin.USER or _is_plain(value):
            try:
                self.add(value)
            except NotDetermined:  # connections, decoders and the like, which no trace depends on
                if self._count > _MOST_VALUES:
                    raise
                self._write(name_of(type(value)))
        elif isinstance(value, types.FunctionType) and self._origin(value.__module__) is Origin.INSTALLED:
            self._plain_function(value)
        del self._path[depth:]

    def _class(self, cls: type) -> None:
        if cls not in self._tokens:
            hasher = hashlib.sha256()
            for base in cls.__mro__:
                hasher.update(f"{name_of(base)} ".encode())
                if self._origin(base.__module__) is not Origin.FRAMEWORK:
                    hasher.update(self._codes.class_digest(base))
                    self._classes.setdefault(base, False)
            self._tokens[cls] = hasher.digest()
        self._write("class", self._tokens[cls])

    def _class_body(self, cls: type) -> None:
        """Attributes of a class, and what its functions hold and read."""
        is_users = self._origin(cls.__module__) is Origin.USER
        self._write("body", name_of(cls))
        self._path.append(f"the class {name_of(cls)}")
        for name, value in sorted(vars(cls).items()):
            functions = functions_in(value)
            if functions:
                for function in functions:
                    own = self._origin(function.__globals__.get("__name__"))
                    if is_users or own is Origin.USER:
                        self.add(function, f".{name}")
                    elif own is Origin.INSTALLED:
                        self._plain_function(function)
            elif name.startswith("__") or name in ("_abc_impl", "_is_protocol"):
                continue
            elif is_users or _is_plain(value):
                self._write(name)
                self.add(value, f".{name}")
        self._path.pop()

    # the hash

    def _digest_of(self, value: Any) -> bytes:
        outer = self._hash, self._memo
        self._hash, self._memo = hashlib.sha256(), {}
        self.add(value)
        digest = self._hash.digest()
        self._hash, self._memo = outer
        return digest

    def _write(self, *parts: str | bytes) -> None:
        """Each part with its length, so that no two sequences of parts give the same bytes."""
        for part in parts:
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self._hash.update(b"%d:" % len(content))
            self._hash.update(content)


def description(value: Tensor) -> str:
    """What a tensor is, but for its values."""
    stride = value.stride() if value.layout is torch.strided else ()
    return f"{tuple(value.shape)} {stride} {value.dtype} {value.device} {value.layout} {value.requires_grad}"


def content_of(value: Tensor) -> bytes:
    """The bytes of a tensor's values, in order."""
    if value.layout is not torch.strided or value.is_quantized:
        raise NotDetermined(f"it is a tensor of layout {value.layout}")
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value is made of numbers, text and torch's names only."""
    if type(value) in _SCALARS or isinstance(value, _TORCH_NAMES):
        return True
    if depth == 0 or not isinstance(value, (tuple, list, set, frozenset, dict)) or len(value) > 1000:
        return False
    return all(_is_plain(v, depth - 1) for v in (value.items() if isinstance(value, dict) else value))
