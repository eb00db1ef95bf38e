"""Runs TorchScript as Python while a potential is traced.

TorchScript computes sizes in plain integers. A trace would make constants of them without an error, so that the program
would be wrong for every other size. Inside :func:`inlined_torchscript`, scripted functions run as the Python functions
that they were made from, and the graphs of scripted modules are interpreted with symbolic sizes.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_januspipe.capture.trace.torchscript_interpreter import interpret
from lightning_januspipe.errors import CaptureError


@contextmanager
def inlined_torchscript(module: nn.Module) -> Iterator[None]:
    """Runs TorchScript as Python inside the block, in this thread.

    A scripted function runs the Python function that it was compiled from; a function that was loaded from a file is
    interpreted. Every ScriptModule below ``module`` is replaced by a plain module with the same parameters, buffers and
    submodule names, which interprets the same graph. After the block everything is as before.

    Args:
        module: a Python module, such as the potential or a wrapper around it; its submodules may be ScriptModules.

    Raises:
        CaptureError: ``module`` itself is a ScriptModule; or, inside the block, a ScriptModule is called that is not
            among the submodules of ``module``, or a graph has a node that cannot be interpreted with symbolic sizes.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"{module.original_name!r} is itself a TorchScript module; a Python module was expected, whose submodules "
            "may be TorchScript. Give the module from before torch.jit.script, or hold this one in another module."
        )
    made: dict[Any, _Interpreted] = {}
    with ExitStack() as undo:
        for path, parent in list(module.named_modules()):
            if isinstance(parent, torch.jit.ScriptModule):
                continue  # replaced as a whole
            for name, child in parent._modules.items():
                if isinstance(child, torch.jit.ScriptModule):
                    undo.callback(operator.setitem, parent._modules, name, child)
                    parent._modules[name] = _interpreted(child, f"{path}.{name}".lstrip("."), made)
        undo.enter_context(_calls_replaced(torch._C.ScriptFunction, _call_function))
        undo.enter_context(_calls_replaced(torch._C.ScriptMethod, _refuse_method))
        yield


@contextmanager
def _calls_replaced(kind: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Turns calls of all instances of ``kind`` in this thread into calls of ``function``."""
    original, thread = kind.__dict__["__call__"], threading.get_ident()

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = original


def _call_function(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    python = getattr(function, "_torchdynamo_inline", None)
    if python is not None:
        return python(*args, **kwargs)
    return interpret(function, f"function {function.name!r}", *args, **kwargs)


def _refuse_method(method: Any, /, *args: Any, **kwargs: Any) -> Any:
    raise CaptureError(
        f"the method {method.name!r} of the TorchScript module {method.owner.qualified_name} is called, which is not "
        "among the submodules of the potential. Hold it as an attribute, in a ModuleList or in a ModuleDict."
    )


class _Interpreted(nn.Module):
    """Stands for a ScriptModule: holds the same tensors under the same names, and interprets its methods."""

    def __init__(self, scripted: Any, path: str) -> None:
        super().__init__()
        self.__dict__["_scripted"], self._path = scripted, path
        self.training = scripted.training
        for name, p in scripted._parameters.items():
            # A loaded module has plain tensors as parameters, which export does not take for parameters.
            self._parameters[name] = p if isinstance(p, nn.Parameter) else nn.Parameter(p, p.requires_grad)
        self._buffers.update(scripted._buffers.items())
        self._non_persistent_buffers_set.update(scripted._non_persistent_buffers_set)

    def __getattr__(self, name: str) -> Any:
        for held in (self._parameters, self._buffers, self._modules):
            if name in held:
                return held[name]
        value = getattr(self._scripted, name)
        if isinstance(value, torch._C.ScriptMethod):
            return functools.partial(interpret, value, f"module {self._path!r}", self)
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__getattr__("forward")(*args, **kwargs)


def _interpreted(scripted: Any, path: str, made: dict[Any, _Interpreted]) -> _Interpreted:
    """Returns the module that stands for ``scripted``; a shared module stays shared."""
    if scripted._c not in made:
        if scripted._c._get_forward_hooks() or scripted._c._get_forward_pre_hooks():
            raise CaptureError(f"the TorchScript module {path!r} has forward hooks, which are not inlined; remove them")
        made[scripted._c] = module = _Interpreted(scripted, path)
        for name, child in scripted._modules.items():
            module._modules[name] = _interpreted(child, f"{path}.{name}", made)
    return made[scripted._c]
