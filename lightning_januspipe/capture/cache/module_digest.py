"""A digest of a module, with its parameters by shape instead of by value, and without what belongs to its training."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import threading
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lightning_januspipe.capture.cache.digest import Digester, content_of, description, name_of
from lightning_januspipe.capture.cache.sources import LIGHTNING, root_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_FLAGS = ("_with_kwargs", "_always_called")
_NO_STATE = frozenset(
    {
        *("_parameters", "_buffers", "_modules", "_compiled_call_impl"),
        *(hooks + flag for hooks in _HOOKS for flag in ("", *_HOOK_FLAGS)),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)
"""What a module's ``__dict__`` holds beside attributes: written in ways of its own, or without effect on a forward."""

_NO_GRAPH_STATE = frozenset(
    {"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras", "meta"}
)
_NO_LIGHTNING_STATE = frozenset(
    {
        *("_trainer", "_fabric", "_fabric_optimizers", "_metric_attributes", "_param_requires_grad_state"),
        *("_current_fx_name", "_hparams_initial", "_compiler_ctx", "_device_mesh", "_jit_is_scripting"),
    }
)
_OF_LIGHTNING = frozenset(
    {"Trainer", "Fabric", "Logger", "Callback", "Strategy", "Accelerator", "Plugin", "LightningDataModule"}
)
_OF_TRAINING = (
    *("torch.optim.", "torch.distributed.", "torch._C._distributed_c10d.", "torch.utils.tensorboard."),
    *("torch.utils.data.", "wandb.", "tensorboardX.", "mlflow."),
)
"""Classes whose objects do not count: no forward computes with them."""


class ModuleDigester(Digester):
    """A digester to which the parameters and submodules of one module are known by name.

    Parameters count by name, shape, dtype, whether they are trained, and by which of them are one; modules by class,
    attributes, buffers and hooks; TorchScript by its code and attributes. Objects of training (Trainer, loggers,
    optimizers, data sets, process groups, metrics) do not count, nor do random generators and locks.

    Args:
        root: the module.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._root = root
        self._modules = {id(m): name for name, m in root.named_modules()}
        self._parameters = {id(p): name for name, p in root.named_parameters()}

    def add_root(self) -> None:
        """The module, and all that it holds."""
        for name, parameter in self._root.named_parameters(remove_duplicate=False):
            self._write("parameter", name, self._parameters[id(parameter)], description(parameter))
            self._class(type(parameter))
            self.add(vars(parameter), f".{name}")
        self._known_module(self._root)

    def add_hooks(self, state: Mapping[str, Any]) -> None:
        """Hooks in their order, without the numbers that they were given.

        Args:
            state: where a module has its hooks and their flags, by name.
        """
        for name in _HOOKS:
            hooks: Mapping[int, Any] = state.get(name) or {}
            flags = [state.get(name + flag) or {} for flag in _HOOK_FLAGS]
            self._write(name, str(len(hooks)))
            for key, hook in hooks.items():
                self._write(str([key in flag for flag in flags]))
                self.add(hook, f" ({name})")

    def label(self, value: Any) -> str | None:
        """Returns the name of a parameter or module of the potential, or None for other values."""
        if id(value) in self._parameters:
            return f"parameter {self._parameters[id(value)]}"
        return f"module {self._modules[id(value)]}" if id(value) in self._modules else None

    def _special(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, torch.jit.ScriptFunction):
            self._script(value, [])
        elif _is_of_training(value):
            self._write("left out", name_of(type(value)))
        else:
            return False
        return True

    def _known_module(self, module: nn.Module) -> None:
        name = self._modules[id(module)]
        self._write("module", name)
        if ("module", name) not in self._done:
            self._done.add(("module", name))
            self._module(module)

    def _module(self, module: nn.Module) -> None:
        self._class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            self._script(module._c, list(module.parameters()))
        elif not any(root_of(c.__module__) == "torchmetrics" for c in type(module).__mro__):
            self._state(module)

    def _state(self, module: nn.Module) -> None:
        state, skipped = vars(module), _NO_STATE
        if any(c.__name__ == "LightningModule" and root_of(c.__module__) in LIGHTNING for c in type(module).__mro__):
            skipped |= _NO_LIGHTNING_STATE
        if isinstance(module, fx.GraphModule):
            skipped |= _NO_GRAPH_STATE | {n for n in state if n.endswith("_hooks")}
            self._write("graph", module.code)
            self._items("targets", [n.target for n in module.graph.nodes])
        self._write("compiled", str(state.get("_compiled_call_impl") is not None))
        self._attributes({n: v for n, v in state.items() if n not in skipped})
        self._mapping("parameters", module._parameters)
        self._mapping("buffers", module._buffers)
        self.add_hooks(state)
        self._write("children", str(len(module._modules)))
        for name, child in module._modules.items():
            self._write(name)
            if child is not None and id(child) in self._modules:
                self._path.append(f".{name}")
                self._known_module(child)
                self._path.pop()
            else:
                self.add(child, f".{name}")

    def _script(self, script: Any, parameters: Iterable[Tensor]) -> None:
        """TorchScript: code, attributes and constants of its archive, without parameters' values and file names."""
        values = {hashlib.sha256(content_of(p)).digest() for p in parameters}
        with zipfile.ZipFile(io.BytesIO(script.save_to_buffer())) as archive:
            for name in sorted(archive.namelist()):
                _, _, inner = name.partition("/")
                if inner.endswith(".debug_pkl") or inner.startswith((".data/", "traced_inputs")):
                    continue
                content = archive.read(name)
                if not (inner.startswith("data/") and hashlib.sha256(content).digest() in values):
                    self._write("script", inner, content)


def _is_of_training(value: Any) -> bool:
    if isinstance(value, (logging.Logger, type(threading.Lock()), type(threading.RLock()))):
        return True
    if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
        return True
    for cls in type(value).__mro__[:-1]:
        if root_of(cls.__module__) in LIGHTNING and cls.__name__ in _OF_LIGHTNING:
            return True
        if f"{cls.__module__}.".startswith(_OF_TRAINING):
            return True
    return False
