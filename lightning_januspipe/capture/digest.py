"""A digest of a module: of everything in it and of all code behind it, with parameters by shape instead of by value.

Two modules with the same digest are traced to the same program. Where that cannot be made sure of, there is none.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import logging
import re
import threading
import types
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_januspipe.capture.sources import (
    LIGHTNING,
    Codes,
    Origin,
    functions_in,
    is_importable,
    loaded_sources,
    origin_of,
    root_of,
    version_of,
)

_MOST_VALUES = 1_000_000

_SCALARS: frozenset[Any] = frozenset({type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)})
_TORCH_NAMES = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)
_TORCH_NAMES += (torch._ops.OpOverloadPacket,)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_FLAGS = ("_with_kwargs", "_always_called")
_NO_STATE = frozenset(
    {
        *("_parameters", "_buffers", "_modules", "_compiled_call_impl"),
        *(hooks + flag for hooks in _HOOKS for flag in ("", *_HOOK_FLAGS)),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)
"""What a module's ``__dict__`` holds beside attributes: treated on its own, or without effect on a forward."""

_NO_GRAPH_STATE = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras", "meta"})
_LIGHTNING_STATE = frozenset(
    {
        *("_trainer", "_fabric", "_fabric_optimizers", "_metric_attributes", "_param_requires_grad_state"),
        *("_current_fx_name", "_hparams_initial", "_compiler_ctx", "_device_mesh", "_jit_is_scripting"),
    }
)
_LIGHTNING_OBJECTS = frozenset(
    {"Trainer", "Fabric", "Logger", "Callback", "Strategy", "Accelerator", "LightningDataModule", "Profiler"}
)
_TRAINING_MODULES = (
    *("torch.optim.", "torch.distributed", "torch._C._distributed_c10d", "torch.utils.tensorboard"),
    *("torch.utils.data.dataloader", "wandb.", "tensorboardX.", "mlflow."),
)


class NotDetermined(Exception):
    """A value of which nothing says whether it is the same in another process."""


def _name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".replace("__mp_main__", "__main__")


class Digester:
    """Writes values into a hash; equal values give equal digests in every process.

    Parameters of ``root`` count by name, shape, dtype and sharing; tensors and buffers by value as well; modules by
    class and attributes; functions by name where torch or Python has them, else by code, defaults and closures. Of the
    user's own classes and functions the globals that they read count too, of installed packages the plain ones, and of
    both all files of the package that are loaded. Objects of training (Trainer, loggers, optimizers, process groups,
    random generators, metrics, locks) do not count. Neither does the order of sets.

    Args:
        root: the module whose parameters and submodules are known by name.

    Raises:
        NotDetermined: (by all methods) a value cannot be told apart, and where it was found.
    """

    def __init__(self, root: nn.Module) -> None:
        self._hash = hashlib.sha256()
        self._codes = Codes()
        self._modules = {id(m): name for name, m in root.named_modules()}
        self._parameters = {id(p): name for name, p in root.named_parameters()}
        self._root = root
        self._memo: dict[int, int] = {}
        self._kept: list[Any] = []  # what the memo knows stays alive, so that its ids stay its own
        self._path: list[str] = []
        self._count = 0
        self._origins: dict[str, Origin] = {}
        self._classes: dict[int, type] = {}
        self._globals: dict[tuple[str, str, int], Any] = {}
        self._done: set[Any] = set()

    @property
    def path(self) -> str:
        """Where the value was found at which the digest stopped."""
        return "".join(self._path).lstrip(".")

    def add_root(self) -> None:
        """The root module: its parameters, all modules below it, and what these hold."""
        for name, parameter in self._root.named_parameters(remove_duplicate=False):
            self._write("parameter", name, self._parameters[id(parameter)], _description(parameter))
            self._class(type(parameter))
            self.add(vars(parameter), f".{name}")
        self._module(self._root)

    def add(self, value: Any, at: str = "") -> None:
        """One value, and all that it holds.

        Args:
            value: anything.
            at: where it stands, for the message of an error.
        """
        kind = type(value)
        self._count += 1
        if kind in _SCALARS:
            self._write(kind.__name__, repr(value))
            return
        if self._count > _MOST_VALUES:
            raise NotDetermined(f"it holds more than {_MOST_VALUES} values")
        self._path.append(at)
        self._add(value, kind)
        self._path.pop()

    def finish(self) -> str:
        """All code behind what was added; then the digest in hexadecimal digits."""
        while self._classes or self._globals:
            classes = [(_name(c), self._codes.class_digest(c), i) for i, c in enumerate(self._classes.values())]
            found, self._classes = list(self._classes.values()), {}
            for *_, index in sorted(classes):
                self._class_body(found[index])
            values, self._globals = self._globals, {}
            for module, name, scope in sorted(values, key=lambda key: key[:2]):
                self._global(module, name, values[module, name, scope])
        for root, origin in sorted(self._origins.items(), key=lambda item: item[0]):
            self._write("package", root, version_of(root))
            for name, content in loaded_sources(root) if origin is not Origin.FRAMEWORK else ():
                self._write(name, content)
        return self._hash.hexdigest()

    # values

    def _add(self, value: Any, kind: Any) -> None:
        if id(value) in self._parameters:
            self._write("parameter", self._parameters[id(value)])
        elif id(value) in self._modules:
            self._write("module", self._modules[id(value)])
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
        if kind is list:
            self._items("list", value)
        elif kind in (dict, OrderedDict, types.MappingProxyType):
            self._mapping(kind.__name__, value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
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
            self._write("descriptor", _name(value.__objclass__), value.__name__)
        elif isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            self._items(kind.__name__, functions_in(value))
        elif isinstance(value, functools.partial):
            self._write("partial")
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, torch.jit.ScriptFunction):
            self._script(value, [])
        elif isinstance(value, Enum):
            self._class(kind)
            self._write(str(value.name))
            self.add(value.value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._write("array", _name(kind), str(value.dtype.descr), str(value.shape), value.tobytes())
        elif isinstance(value, weakref.ref):
            self._write("reference")
            self.add(value())
        elif self._is_of_training(value):
            self._write("left out", _name(kind))
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
        self._write("tensor", _description(value))
        self.add(vars(value))
        if not value.is_meta:
            self._write(_content(value))

    def _reduced(self, value: Any, kind: Any) -> None:
        """What pickle would keep of an object."""
        try:
            reduce = copyreg.dispatch_table.get(kind)
            parts = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:
            raise NotDetermined(f"it is a {_name(kind)}, which cannot be pickled ({error})") from error
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

    def _is_of_training(self, value: Any) -> bool:
        if isinstance(value, (logging.Logger, torch.Generator, type(threading.Lock()), type(threading.RLock()))):
            return True
        for cls in type(value).__mro__[:-1]:
            if root_of(cls.__module__) in LIGHTNING and cls.__name__ in _LIGHTNING_OBJECTS:
                return True
            if f"{cls.__module__}.".startswith(_TRAINING_MODULES):
                return True
        return False

    # modules

    def _module(self, module: nn.Module) -> None:
        name = self._modules.get(id(module))
        if name is not None:
            self._write("module", name)
            if ("module", name) in self._done:
                return
            self._done.add(("module", name))
        self._class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            self._script(module._c, list(module.parameters()))
        elif not any(root_of(c.__module__) == "torchmetrics" for c in type(module).__mro__):
            self._module_state(module)

    def _module_state(self, module: nn.Module) -> None:
        state = vars(module)
        skipped = _NO_STATE
        if any(c.__name__ == "LightningModule" and root_of(c.__module__) in LIGHTNING for c in type(module).__mro__):
            skipped = skipped | _LIGHTNING_STATE
        if isinstance(module, fx.GraphModule):
            skipped = skipped | _NO_GRAPH_STATE | {n for n in state if n.endswith("_hooks")}
            self._write("graph", module.code)
            self._items("targets", [n.target for n in module.graph.nodes])
        self._write("compiled", str(state.get("_compiled_call_impl") is not None))
        self._attributes({n: v for n, v in state.items() if n not in skipped})
        self._mapping("parameters", module._parameters)
        self._mapping("buffers", module._buffers)
        self.add_hooks({n: state.get(n) for n in (h + f for h in _HOOKS for f in ("", *_HOOK_FLAGS))})
        self._write("children", str(len(module._modules)))
        for name, child in module._modules.items():
            self._write(name)
            self._path.append(f".{name}")
            if id(child) in self._modules:
                self._module(child)
            else:
                self.add(child)
            self._path.pop()

    def add_hooks(self, state: Mapping[str, Any]) -> None:
        """Hooks in their order, without the numbers that they were given."""
        for name in _HOOKS:
            hooks: Mapping[int, Any] = state.get(name) or {}
            flags = [state.get(name + flag) or {} for flag in _HOOK_FLAGS]
            self._write(name, str(len(hooks)))
            for key, hook in hooks.items():
                self._write(str([key in flag for flag in flags]))
                self.add(hook, f" ({name})")

    def _script(self, script: Any, parameters: Iterable[Tensor]) -> None:
        """TorchScript: code, attributes and constants of its archive, without parameters' values and file names."""
        values = {hashlib.sha256(_content(p)).digest() for p in parameters}
        with zipfile.ZipFile(io.BytesIO(script.save_to_buffer())) as archive:
            for name in sorted(archive.namelist()):
                _, _, inner = name.partition("/")
                if inner.endswith(".debug_pkl") or inner.startswith((".data/", "traced_inputs")):
                    continue
                content = archive.read(name)
                if not (inner.startswith("data/") and hashlib.sha256(content).digest() in values):
                    self._write("script", inner, content)

    # code

    def _origin(self, module: str | None) -> Origin:
        root = root_of(module)
        if root not in self._origins:
            self._origins[root] = origin_of(root)
        return self._origins[root]

    def _function(self, function: Any) -> None:
        self._write("function", _name(function))
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
        if function.__code__ not in self._done:
            self._done.add(function.__code__)
            self._write(_name(function), self._codes.digest(function.__code__))
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
        self._path.append(f"the global {module}.{name}, which its code reads")
        if self._origin(module) is Origin.USER or _is_plain(value):
            self.add(value)
        elif isinstance(value, types.FunctionType) and self._origin(value.__module__) is Origin.INSTALLED:
            self._plain_function(value)
        self._path.pop()

    def _class(self, cls: type) -> None:
        self._write("class", str(len(cls.__mro__)))
        for base in cls.__mro__:
            self._write(_name(base))
            if self._origin(base.__module__) is not Origin.FRAMEWORK:
                self._write(self._codes.class_digest(base))
                if base not in self._done:
                    self._done.add(base)
                    self._classes[id(base)] = base

    def _class_body(self, cls: type) -> None:
        """Attributes of a class, and what its functions hold and read."""
        is_users = self._origin(cls.__module__) is Origin.USER
        self._write("body", _name(cls))
        self._path.append(f"the class {_name(cls)}")
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


def _description(value: Tensor) -> str:
    stride = value.stride() if value.layout is torch.strided else ()
    return f"{tuple(value.shape)} {stride} {value.dtype} {value.device} {value.layout} {value.requires_grad}"


def _content(value: Tensor) -> bytes:
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
