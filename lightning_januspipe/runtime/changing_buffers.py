"""Keeps the buffers that the phases of a step read as they are, while losses change them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_Place = tuple[nn.Module, str]


class ChangingBuffers:
    """Lets the user's step change buffers of the potential, as running means, without a change to phases in progress.

    Phases that compute something again would read the new values otherwise. Losses see what the losses before them in
    the same optimizer step have made of a buffer; the potential reads that from the next optimizer step on.

    Which buffers change is found in the first optimizer step, in which all are copied.

    Args:
        potential: The live potential.
    """

    def __init__(self, potential: nn.Module) -> None:
        self._names: dict[_Place, str] = {}
        for path, module in potential.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                found = {name for name, buffer in module._buffers.items() if buffer is not None}
                self._names |= {(module, name): f"{path}.{name}".lstrip(".") for name in found}
        self._changing: list[_Place] | None = None
        self._changed: dict[_Place, Tensor | None] = {}

    @contextmanager
    def in_loss(self) -> Iterator[None]:
        """Lets the block read and change the buffers as the losses before it in this optimizer step have left them."""
        places = list(self._names) if self._changing is None else self._changing
        known = set(places)
        others = [place for place in self._names if place not in known]
        versions = [_version(place) for place in others]
        copies: dict[Tensor, Tensor] = {}
        for module, name in places:
            if (module, name) not in self._changed:
                buffer = module._buffers[name]
                if buffer is not None and buffer not in copies:
                    copies[buffer] = buffer.detach().clone()
                self._changed[module, name] = None if buffer is None else copies[buffer]
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
        late = [place for place, version in zip(others, versions, strict=True) if _version(place) != version]
        if late:
            self._warn_of(late)

    @contextmanager
    def as_read_by_phases(self) -> Iterator[None]:
        """Lets a part of the block of :meth:`in_loss` read what phases read."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def end_step(self) -> None:
        """Gives the potential what the losses of an optimizer step have made of its buffers."""
        changed = {p: after for p, after in self._changed.items() if self._changing is not None or _differs(p, after)}
        self._changing = list(changed) if self._changing is None else self._changing
        for (module, name), after in changed.items():
            before = module._buffers[name]
            if before is None or after is None or (before.shape, before.dtype) != (after.shape, after.dtype):
                module._buffers[name] = after
            else:
                before.copy_(after.detach())
        self._changed.clear()

    def clear(self) -> None:
        """Forgets changes after an error."""
        self._changed.clear()

    def _exchange(self) -> None:
        """Exchanges the buffers that phases read for those that losses read, or these for those."""
        for place, other in self._changed.items():
            module, name = place
            self._changed[place], module._buffers[name] = module._buffers[name], other

    def _warn_of(self, late: list[_Place]) -> None:
        assert self._changing is not None
        self._changing += late
        names = ", ".join(self._names[place] for place in late[:3])
        warnings.warn(
            f"the step has changed buffers of the potential that its first steps left alone: {names}. Phases of this "
            "optimizer step that compute something again may have read the new values; from the next step on they "
            "read those of its start.",
            stacklevel=2,
        )


def _version(place: _Place) -> tuple[int, int]:
    """Returns what tells whether a buffer was replaced, or changed in place by an operation that says so."""
    buffer = place[0]._buffers[place[1]]
    return id(buffer), 0 if buffer is None else buffer._version


def _differs(place: _Place, other: Tensor | None) -> bool:
    buffer = place[0]._buffers[place[1]]
    if buffer is None or other is None:
        return buffer is not other
    return buffer.shape != other.shape or not torch.allclose(buffer, other, 0, 0, equal_nan=True)
