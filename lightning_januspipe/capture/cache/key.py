"""The key of a traced potential: the same for the same model, call and versions in another process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache.digest import NotDetermined
from lightning_januspipe.capture.cache.module_digest import ModuleDigester
from lightning_januspipe.capture.cache.sources import version_of
from lightning_januspipe.capture.find.call_format import CallFormat, call_leaves
from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.trees import children

_FORMAT = "2"
_OWN = __name__.partition(".")[0]


@dataclass(frozen=True)
class ProgramKey:
    """What tells one traced potential from another one.

    Attributes:
        digest: 64 hexadecimal digits; None where the potential cannot be told from another one.
        reason: why there is no digest.
    """

    digest: str | None
    reason: str = ""


def program_key(
    potential: nn.Module,
    call: PotentialCall,
    form: CallFormat | None = None,
    adapters: Sequence[Adapter] = (),
    extra: Sequence[str] = (),
) -> ProgramKey:
    """The key of what :func:`~lightning_januspipe.capture.trace.trace.trace_potential` would return.

    It depends on everything that the trace depends on: all modules with their attributes, buffers, hooks and code (see
    :class:`~.module_digest.ModuleDigester`); the places, dtypes and numbers of dimensions of
    the call's tensors and the values of its constants; the default dtype and device, autocast; the versions of Python,
    torch and this package. It does not depend on values of parameters, nor on sizes of batches.

    What is not seen: files and environment variables that a forward reads, what it reads from the Trainer, and objects
    other than numbers and text that are put into globals of installed packages while the program runs. So a program
    that was found by its key is validated as a new one is.

    Compute it right before tracing: attributes and lazy imports that a trace leaves behind would count.

    Args:
        potential: as given to :func:`~lightning_januspipe.capture.trace.trace.trace_potential`, like the next three.
        call: the potential's call.
        form: the format of its calls.
        adapters: what is special to its package.
        extra: whatever else the program depends on.

    Returns:
        The key; without a digest, and with the reason, where something in the potential cannot be told apart.
    """
    form = form or CallFormat.of(call.args, call.kwargs)
    digester = ModuleDigester(potential)
    try:
        digester.add([*_environment(), *extra])
        for package in ("capture", "engine.specs", "errors"):
            digester.add_package(f"{_OWN}.{package}")
        digester.add_hooks(
            {f"_forward{n}_hooks": getattr(torch_module, f"_global_forward{n}_hooks") for n in ("", "_pre")}
        )
        digester.add([*adapters], " (an adapter)")
        digester.add(
            dict(sorted(_containers((call.args, call.kwargs)), key=lambda container: container[0])), " (an argument)"
        )
        for place, leaf in call_leaves(call.args, call.kwargs).items():
            digester.add((place, _described(leaf, place, form)), f" (the argument {place})")
        digester.add_root()
        return ProgramKey(digester.finish())
    except NotDetermined as error:
        return ProgramKey(None, f"{digester.path or type(potential).__name__}: {error}")
    except Exception as error:  # any object may refuse to be looked at; then the potential is traced again
        where = digester.path or type(potential).__name__
        return ProgramKey(None, f"{where}: looking at it fails ({type(error).__name__}: {error})")


def _described(leaf: Any, place: str, form: CallFormat) -> Any:
    """What of an argument a trace depends on; of sizes only 0 and 1 may be taken for constants."""
    if isinstance(leaf, Tensor):
        sizes = tuple(min(size, 2) for size in leaf.shape)
        return sizes, str(leaf.dtype), str(leaf.device), leaf.is_contiguous(), type(leaf)
    if place in form.sizes:
        return "size", min(leaf, 2)
    return form.constants[place] if place in form.constants else type(leaf)


def _containers(value: Any, place: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, type]]:
    """Places and types of the containers in a call."""
    parts = children(value) if id(value) not in within else None
    if parts is not None:
        yield place, type(value)
        for key, part in parts:
            yield from _containers(part, place + key, (*within, id(value)))


def _environment() -> Iterator[str]:
    """Versions and settings that a trace depends on."""
    yield f"format {_FORMAT}, version {version_of(_OWN)}"
    yield f"python {sys.version_info[:2]}, torch {torch.__version__} {torch.version.git_version}"
    yield f"default {torch.get_default_dtype()} {torch.get_default_device()}"
    for device in ("cpu", "cuda", "xpu", "mps"):
        if torch.amp.is_autocast_available(device):
            yield f"autocast {device} {torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
