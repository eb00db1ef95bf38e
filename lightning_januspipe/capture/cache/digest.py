"""Makes a digest of a module and of all that it holds, which is the same in another process."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import pickle
import random
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_januspipe.capture.cache.code import described, is_framework, root_of

_MOST_VALUES = 500_000  # that a potential may hold; the digest of more is an error
_ATOMS: frozenset[Any] = frozenset({type(None), bool, int, float, complex, str, bytes})
_NAMED = (torch.dtype, torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_FLAGS = ("_with_kwargs", "_always_called")
_NO_STATE = frozenset(
    {
        *("_parameters", "_buffers", "_modules", *_HOOKS, *(hooks + flag for hooks in _HOOKS for flag in _HOOK_FLAGS)),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_trainer", "_fabric", "_fabric_optimizers", "_metric_attributes", "_param_requires_grad_state"),
        *("_current_fx_name", "_hparams_initial", "_compiler_ctx", "_device_mesh", "_jit_is_scripting"),
        *("_compiled_call_impl", "_januspipe_file"),
    }
)
"""Attributes of modules that are written in ways of their own, or without effect on a forward."""

_NO_GRAPH_STATE = {"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras", "meta"}
_OF_TRAINING = (
    *("torch.optim.", "torch.distributed.", "torch._C._distributed_c10d.", "torch.utils.", "tensorboardX.", "wandb."),
    *("lightning.", "pytorch_lightning.", "lightning_fabric.", "mlflow."),
)
_STATEFUL = (
    *(logging.Logger, type(threading.Lock()), type(threading.RLock()), torch.Generator, random.Random),
    *(np.random.Generator, np.random.RandomState),
)


class Digester:
    """Makes digests of values: hashes of what pickle writes, with stand-ins for what it refuses or knows by name alone.

    Parameters of the root module count by name, shape, dtype and whether they are trained, other tensors by value;
    modules by class, attributes, buffers and hooks; TorchScript by its archive; functions by code, defaults and
    closures. Dicts count in their order, which code may follow; sets without. Objects of training do not count.

    Args:
        root: the module whose parameters and submodules are known by name.

    Attributes:
        roots: top-level packages of all classes and functions that were found.
        path: where the value stands that is digested, for messages.
    """

    def __init__(self, root: nn.Module) -> None:
        self._known = {id(m): f"module {name}" for name, m in root.named_modules()}
        self._known |= {id(p): f"parameter {name}" for name, p in root.named_parameters()}
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # what was seen stays alive, so that its id stays its own
        self._count = 0
        self.roots: set[str] = set()
        self.path = ""

    def digest(self, value: Any) -> str:
        """Returns the digest of a value and of all that it holds; an error where it cannot tell two values apart."""
        file = io.BytesIO()
        _Pickler(self, file).dump(value)
        return hashlib.sha256(file.getbuffer()).hexdigest()

    def of_modules(self, root: nn.Module) -> Iterator[str]:
        """Yields the digests of a module's parameters, and of all its modules."""
        for name, parameter in root.named_parameters(remove_duplicate=False):
            yield self.digest((name, self._known[id(parameter)], _description(parameter), type(parameter)))
        for name, module in root.named_modules():
            yield self.digest((name, *self._parts(module, name)))

    def stand_in(self, value: Any) -> str | None:
        """Returns the stand-in that is written for a value; None where pickle writes the value itself."""
        kind = type(value)
        if kind in _ATOMS or kind is tuple:
            return None
        self._count += 1
        if self._count > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values were found in it and what it holds")
        if id(value) in self._known:
            return self._known[id(value)]
        self.roots.add(root_of(value))
        if isinstance(value, (ModuleType, *_NAMED)):
            return f"{kind.__name__} {value.__name__ if isinstance(value, ModuleType) else value}"
        if kind in (set, frozenset):
            return f"{kind.__name__} {sorted(map(self._of_member, value))}"
        if isinstance(value, type):
            self.roots.update(map(root_of, value.__mro__))
            own = [c for c in value.__mro__ if not is_framework(root_of(c))]  # torch counts calls in its classes
            plain = [(n, v) for c in own for n, v in sorted(vars(c).items()) if type(v) in _ATOMS]
            return f"class {name_of(value)} {[(n, v) for n, v in plain if not n.startswith('__')]}"
        if _is_of_training(value):
            return f"left out {name_of(kind)}"
        if id(value) in self._seen:
            return f"again {self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        parts = self._made_of(value)
        return None if parts is None else f"{kind.__name__} {self.digest(parts)}"

    def _of_member(self, value: Any) -> str:
        """Returns the digest of a member of a set, whose place among the members is not known yet."""
        if type(value) not in _ATOMS and type(value) not in (tuple, frozenset):
            raise ValueError(f"it is a set of objects ({name_of(type(value))})")
        return self.digest(value)

    def _made_of(self, value: Any) -> Any:
        """Returns the contents of a value that pickle refuses, or knows by its name alone; None for other values."""
        if isinstance(value, Tensor):
            return type(value), _description(value), vars(value), None if value.is_meta else _content(value)
        if isinstance(value, torch.jit.ScriptFunction):
            return list(_archive(value, ()))
        if isinstance(value, nn.Module):
            return list(self._parts(value))
        if isinstance(value, FunctionType):
            if is_framework(root_of(value)) and "<locals>" not in value.__qualname__:
                return name_of(value)
            return name_of(value), described(value.__code__), list(_held_by(value)), vars(value)
        if isinstance(value, MethodType):
            return value.__func__, value.__self__
        return value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else None

    def _parts(self, module: nn.Module, path: str = "") -> Iterator[Any]:
        """Yields what a module is made of."""
        yield type(module)
        if isinstance(module, torch.jit.ScriptModule):
            yield from _archive(module._c, module.parameters())
        elif not any(root_of(c) == "torchmetrics" for c in type(module).__mro__):
            state, is_graph = vars(module), isinstance(module, fx.GraphModule)
            yield state.get("_compiled_call_impl") is not None, is_graph and module.code
            yield [n.target for n in module.graph.nodes] if isinstance(module, fx.GraphModule) else None
            for name in sorted(state.keys() - _NO_STATE - (_NO_GRAPH_STATE if is_graph else set())):
                self.path = f"{path}.{name}".lstrip(".")
                yield name, self.digest(state[name])
            self.path = f"buffers and hooks of {path or 'the module itself'}"
            yield module._parameters, module._buffers, hooks_in(state), list(module._modules.items())


class _Pickler(pickle.Pickler):
    """Writes a value with the stand-ins of a :class:`Digester`."""

    def __init__(self, digester: Digester, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.fast = True  # pickle's own memo would tell equal strings from one string
        self._digester = digester

    def persistent_id(self, value: Any) -> str | None:
        """Returns what is written in the place of a value."""
        return self._digester.stand_in(value)


def name_of(value: Any) -> str:
    """Returns module and name of a class or function."""
    return f"{value.__module__}.{value.__qualname__}".replace("__mp_main__", "__main__")


def hooks_in(state: Mapping[str, Any]) -> list[Any]:
    """Returns a module's hooks in their order with their flags, without the numbers that they were given."""
    flags = [[state.get(name + flag) or () for flag in _HOOK_FLAGS] for name in _HOOKS]
    hooks = [(state.get(name) or {}).items() for name in _HOOKS]
    return [[(hook, [k in f for f in fs]) for k, hook in of] for of, fs in zip(hooks, flags, strict=True)]


def _held_by(function: FunctionType) -> Iterator[Any]:
    """Yields the default arguments of a function, and the contents of its closure."""
    yield function.__defaults__, function.__kwdefaults__
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents


def _description(value: Tensor) -> str:
    """Returns a description of a tensor without its values."""
    stride = value.stride() if value.layout is torch.strided else ()
    return f"{tuple(value.shape)} {stride} {value.dtype} {value.device} {value.layout} {value.requires_grad}"


def _content(value: Tensor) -> bytes:
    """Returns the bytes of a tensor's values, in order."""
    if value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"it is a tensor of layout {value.layout}")
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _archive(script: Any, parameters: Iterable[Tensor]) -> Iterator[Any]:
    """Yields code, attributes and constants of TorchScript, without parameters' values and names of files."""
    values = {hashlib.sha256(_content(p)).digest() for p in parameters}
    with zipfile.ZipFile(io.BytesIO(script.save_to_buffer())) as archive:
        for name in sorted(archive.namelist()):
            inner, content = name.partition("/")[2], archive.read(name)
            if inner.endswith(".debug_pkl") or inner.startswith((".data/", "traced_inputs")):
                continue
            if not (inner.startswith("data/") and hashlib.sha256(content).digest() in values):
                yield inner, content


def _is_of_training(value: Any) -> bool:
    """Tells whether no forward computes with a value: a Trainer, a logger, an optimizer, a random generator."""
    if isinstance(value, _STATEFUL):
        return True
    classes = () if isinstance(value, (nn.Module, dict)) else type(value).__mro__[:-1]
    return any(f"{c.__module__}.".startswith(_OF_TRAINING) for c in classes)
