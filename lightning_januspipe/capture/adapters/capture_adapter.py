"""Defines how an adapter helps a package's models through capture, and finds the adapters of a potential."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from lightning_januspipe.errors import CaptureError

GROUP = "lightning_januspipe.adapters"
"""The group of entry points that name a package (``my_package``, ``my_package.models``) and its adapter's class."""

BUILT_IN = {
    "aimnet": "lightning_januspipe.capture.adapters.aimnet:AIMNetAdapter",
    "chgnet": "lightning_januspipe.capture.adapters.chgnet:CHGNetAdapter",
    "fairchem": "lightning_januspipe.capture.adapters.fairchem:FairchemAdapter",
    "matgl": "lightning_januspipe.capture.adapters.matgl:MatGLAdapter",
    "matris": "lightning_januspipe.capture.adapters.matris:MatRISAdapter",
    "nequip": "lightning_januspipe.capture.adapters.nequip:NequIPAdapter",
    "torchani": "lightning_januspipe.capture.adapters.torchani:TorchANIAdapter",
    "torchmdnet": "lightning_januspipe.capture.adapters.torchmdnet:TorchMDNetAdapter",
}


class Adapter:
    """Helps the models of one package through capture; a subclass overrides what it needs.

    A package registers its own in its ``pyproject.toml``::

        [project.entry-points."lightning_januspipe.adapters"]
        my_package = "my_package.januspipe:MyAdapter"
    """

    version = "1"
    """Changes with the adapter: a potential that was traced with another version is traced again."""

    graph_size = 1
    """Number of graph ranks that the potential is traced for. Several ranks cannot run operations of packages
    that read indices of atoms together with features."""

    def capturing(self, module: nn.Module) -> AbstractContextManager[None]:
        """Returns a context for the whole capture, and for the validation that Lightning runs before training.

        It switches off what a module does beside computing its forward, such as compiling itself when it is first
        called. The user's step runs inside it.

        Args:
            module: the LightningModule.
        """
        return nullcontext()

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Makes the arguments of the traced call from those of the user's call, for every batch and outside the trace.

        It computes what cannot be traced and has no derivative: indices, padding, batches of graphs.

        Args:
            potential: the module whose forward differentiates the energy.
            args: positional arguments of the user's call.
            kwargs: its keyword arguments.

        Returns:
            Arguments in which everything that changes with the batch is a tensor or an integer.
        """
        return args, kwargs

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which ``potential`` is traced with what :meth:`arguments` returns."""
        return nullcontext()

    def joined(self, potential: nn.Module, returned: Any) -> Any:
        """Joins lists of tensors in what the forward returned, each to one tensor: what the traced call returns.

        A list with an entry for each structure has no fixed length, which a trace needs. Entries keep their keys.

        Args:
            potential: the module whose forward differentiates the energy.
            returned: what its forward returned, for the user's call or, inside :meth:`tracing`, for the traced call.
        """
        return returned

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        """Separates joined tensors into lists again: makes what the user's call returns. Inverse of :meth:`joined`.

        Args:
            potential: the module whose forward differentiates the energy.
            args: positional arguments of the user's call.
            kwargs: its keyword arguments.
            returned: what the traced call returned; a value that the user's step did not read is no tensor.
        """
        return returned


@lru_cache(maxsize=1)
def _registered(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Returns the registered adapters of the packages on ``sys.path``; searching it is slow, so this is cached."""
    return tuple(entry_points(group=GROUP))


def adapters_of(potential: nn.Module, graph_size: int = 1) -> list[Adapter]:
    """Returns the adapters for the packages that define a potential or one of its parts, registered ones first.

    Args:
        potential: the potential.
        graph_size: number of graph ranks, which the adapters get.

    Raises:
        CaptureError: a registered adapter cannot be loaded.
    """
    modules = {c.__module__ for m in potential.modules() for c in type(m).__mro__}

    def concerns(package: str) -> bool:
        return any(m == package or m.startswith(f"{package}.") for m in modules)

    registered = {e.name: e for e in _registered(tuple(sys.path)) if concerns(e.name)}
    found = [_loaded(e) for _, e in sorted(registered.items())]
    for package, place in BUILT_IN.items():
        if package not in registered and concerns(package):
            module, _, name = place.partition(":")
            found.append(getattr(importlib.import_module(module), name)())
    for adapter in found:
        adapter.graph_size = graph_size
    return found


@contextmanager
def capturing(module: nn.Module) -> Iterator[None]:
    """Enters the :meth:`Adapter.capturing` contexts of all adapters for a LightningModule and its parts."""
    with ExitStack() as stack:
        for adapter in adapters_of(module):
            stack.enter_context(adapter.capturing(module))
        yield


def adapted(
    adapters: Sequence[Adapter], potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the traced call, made by all adapters in turn."""
    for adapter in adapters:
        args, kwargs = adapter.arguments(potential, args, kwargs)
    return args, kwargs


def joined(adapters: Sequence[Adapter], potential: nn.Module, returned: Any) -> Any:
    """Returns what the traced call returns, made by all adapters in turn from what the forward returned."""
    for adapter in adapters:
        returned = adapter.joined(potential, returned)
    return returned


def separated(
    adapters: Sequence[Adapter], potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any
) -> Any:
    """Returns what the user's call returns, made by all adapters in turn from what the traced call returned."""
    for adapter in reversed(adapters):
        returned = adapter.separated(potential, args, kwargs, returned)
    return returned


def _loaded(entry: EntryPoint) -> Adapter:
    try:
        found = entry.load()()
    except Exception as error:
        raise CaptureError(
            f"the adapter {entry.value!r} that is registered for {entry.name!r} cannot be loaded: "
            f"{type(error).__name__}: {error}. Repair or uninstall the package that registers it."
        ) from error
    if not isinstance(found, Adapter):
        raise CaptureError(
            f"the adapter {entry.value!r} that is registered for {entry.name!r} is a {type(found).__name__}; "
            "expected a subclass of lightning_januspipe.capture.adapters.Adapter"
        )
    return found
