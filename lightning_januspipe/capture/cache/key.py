"""Computes the key of a captured program: the same for the same model, call and versions in another process.

A program that is found by its key is validated like a new one: against the eager module, with the parameter gradient
of a force loss, on a batch with other sizes than the traced one, and in evaluation. What differs there is traced again.
The key has to differ where that validation may see no difference: in values that change results by less than its
tolerance, and in branches that its batch does not take. So the key covers:

- the module tree: classes, attributes, buffers by value, parameters by name, shape and dtype, hooks (``digest.py``);
- the code of all modules that the model's code leads to, as it is loaded, and the globals that it reads (``code.py``);
- the call: places, dtypes and numbers of dimensions of its tensors, values of its constants; sizes only as 0, 1, more;
- the files of this package's capture, the versions of Python, torch and other large packages, the default dtype and
  device, and autocast.

The key does not cover these, and validation has to find them: what a forward reads from files, environment variables
and the Trainer; objects in globals of installed packages; globals that cannot be pickled, but for their type; large
packages that were edited without another version; and this package's code, if it was changed after it was loaded.

Where a value cannot be told from another one, there is no key, and the potential is traced at every start.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache.code import code_of
from lightning_januspipe.capture.cache.digest import Digester, hooks_in
from lightning_januspipe.capture.find.call_format import CallFormat, call_leaves
from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.trees import children

_FORMAT = "2"
_OWN = Path(__file__).parents[2]


@dataclass(frozen=True)
class ProgramKey:
    """Tells one captured program from another one.

    Attributes:
        digest: 64 hexadecimal digits; None where the potential cannot be told from another one.
        reason: why there is no digest.
    """

    digest: str | None
    reason: str = ""


def program_key(
    potential: nn.Module,
    call: PotentialCall,
    call_format: CallFormat | None = None,
    adapters: Sequence[Adapter] = (),
    extra: Sequence[str] = (),
) -> ProgramKey:
    """Returns the key of what :func:`~lightning_januspipe.capture.trace.trace.trace_potential` would return.

    Compute it right before tracing: attributes and lazy imports that a trace leaves behind would count.

    Args:
        potential: as given to :func:`~lightning_januspipe.capture.trace.trace.trace_potential`, like the next three.
        call: the potential's call.
        call_format: the format of its calls.
        adapters: what is special to its package.
        extra: whatever else the program depends on.

    Returns:
        The key; without a digest, and with the reason, where something in the potential cannot be told apart.
    """
    call_format = call_format or CallFormat.of(call.args, call.kwargs)
    digester = Digester(potential)
    found = hashlib.sha256()
    try:
        for part in (*environment(), *extra):
            found.update(f"{len(part)}:{part}".encode())
        digester.path = "hooks of all modules"
        found.update(digester.digest(hooks_in(_global_hooks())).encode())
        digester.path = "an adapter"
        found.update(digester.digest(list(adapters)).encode())
        containers = sorted(_containers((call.args, call.kwargs)), key=lambda container: container[0])
        found.update(digester.digest(containers).encode())
        for place, leaf in call_leaves(call.args, call.kwargs).items():
            digester.path = f"the argument {place}"
            found.update(digester.digest((place, _described(leaf, place, call_format))).encode())
        for digest in digester.of_modules(potential):
            found.update(digest.encode())
        digester.path = "the code behind it"
        for digest in code_of(digester.roots, digester.digest):
            found.update(digest.encode())
    except Exception as error:  # any object may refuse to be looked at; then the potential is traced again
        return ProgramKey(None, f"{digester.path or type(potential).__name__}: {type(error).__name__}: {error}")
    return ProgramKey(found.hexdigest())


def _described(leaf: Any, place: str, call_format: CallFormat) -> Any:
    """Describes an argument as far as a trace depends on it: of sizes only 0 and 1 may be taken for constants."""
    if isinstance(leaf, Tensor):
        sizes = tuple(min(size, 2) for size in leaf.shape)
        return sizes, str(leaf.dtype), str(leaf.device), leaf.is_contiguous(), type(leaf)
    if place in call_format.sizes:
        return "size", min(leaf, 2)
    return call_format.constants[place] if place in call_format.constants else type(leaf)


def _containers(value: Any, place: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, type]]:
    """Yields places and types of the containers in a call."""
    parts = children(value) if id(value) not in within else None
    if parts is not None:
        yield place, type(value)
        for key, part in parts:
            yield from _containers(part, place + key, (*within, id(value)))


def _global_hooks() -> dict[str, Any]:
    return {f"_forward{n}_hooks": getattr(torch_module, f"_global_forward{n}_hooks") for n in ("", "_pre")}


def environment() -> Iterator[str]:
    """Yields versions and settings that a trace depends on, and the sources of this package that make the program."""
    yield f"format {_FORMAT}, version {sys.modules[_OWN.name].__version__}"
    yield f"python {sys.version_info[:2]}, torch {torch.__version__} {torch.version.git_version}"
    yield f"default {torch.get_default_dtype()} {torch.get_default_device()}"
    for device in ("cpu", "cuda", "xpu", "mps"):
        if torch.amp.is_autocast_available(device):
            yield f"autocast {device} {torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
    for file in sorted(_OWN.rglob("*.py")):
        yield f"{file.relative_to(_OWN)} {hashlib.sha256(file.read_bytes()).hexdigest()}"
