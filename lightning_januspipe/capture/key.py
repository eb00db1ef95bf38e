"""The key of a traced potential: the same for the same model, call and versions in another process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_januspipe.capture.calls import call_leaves
from lightning_januspipe.capture.digest import Digester, NotDetermined
from lightning_januspipe.capture.find import PotentialCall

_FORMAT = "1"


@dataclass(frozen=True)
class ProgramKey:
    """What tells one traced potential from another.

    Attributes:
        digest: 64 hexadecimal digits; None where the potential cannot be told from another one.
        reason: why there is no digest.
    """

    digest: str | None
    reason: str = ""


def program_key(potential: nn.Module, call: PotentialCall, extra: Sequence[str] = ()) -> ProgramKey:
    """The key of what :func:`~lightning_januspipe.capture.trace.trace_potential` would return.

    It depends on everything that the trace depends on: all modules with their attributes, buffers, hooks and code (see
    :class:`~lightning_januspipe.capture.digest.Digester`); the places, dtypes and numbers of dimensions of the call's
    tensors and the values of its other arguments; the default dtype and device, autocast; the versions of Python, torch
    and this package. It does not depend on values of parameters, nor on sizes of batches.

    What is not seen: files and environment variables that a forward reads, and objects other than numbers and text that
    are put into globals of installed packages while the program runs.

    Compute it before the potential has run (lazy imports and attributes that a forward leaves behind would count).

    Args:
        potential: the submodule that :func:`~lightning_januspipe.capture.find.find_potential` found.
        call: its call.
        extra: whatever else the program depends on.

    Returns:
        The key; without a digest, and with the reason, where something in the potential cannot be told apart.
    """
    digester = Digester(potential)
    try:
        digester.add([*_environment(), *extra])
        digester.add_hooks({f"_forward{n}_hooks": getattr(torch_module, f"_global_forward{n}_hooks") for n in ("", "_pre")})
        for place, leaf in call_leaves(call.args, call.kwargs).items():
            digester.add((place, _described(leaf)) if isinstance(leaf, Tensor) else (place, leaf))
        digester.add(_containers((call.args, call.kwargs)))
        digester.add_root()
        return ProgramKey(digester.finish())
    except NotDetermined as error:
        return ProgramKey(None, f"{digester.path or type(potential).__name__}: {error}")
    except Exception as error:  # any object may refuse to be looked at; then the potential is traced again
        where = digester.path or type(potential).__name__
        return ProgramKey(None, f"{where}: looking at it fails ({type(error).__name__}: {error})")


def _described(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor of a call without its sizes; of these only 0 and 1 may be taken for constants."""
    sizes = tuple(min(size, 2) for size in tensor.shape)
    return sizes, str(tensor.dtype), str(tensor.device), tensor.is_contiguous(), type(tensor)


def _containers(tree: Any) -> Any:
    """Types of the dicts, lists and tuples of a call; dicts may have their entries in any order."""
    if isinstance(tree, dict):
        return type(tree), sorted(((repr(k), _containers(v)) for k, v in tree.items()), key=lambda entry: entry[0])
    if isinstance(tree, (list, tuple)):
        return type(tree), [_containers(v) for v in tree]
    return None


def _environment() -> Iterator[str]:
    """Versions and settings that a trace depends on."""
    package = sys.modules[__name__.partition(".")[0]]
    yield f"format {_FORMAT}, version {getattr(package, '__version__', '')}"
    yield f"python {sys.version_info[:2]}, torch {torch.__version__} {torch.version.git_version}"
    yield f"default {torch.get_default_dtype()} {torch.get_default_device()}"
    for device in ("cpu", "cuda", "xpu", "mps"):
        if torch.amp.is_autocast_available(device):
            yield f"autocast {device} {torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "engine" / "specs.py"):
        yield f"{file.name} {file.read_bytes()!r}"
