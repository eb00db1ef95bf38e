"""Runs each phase under the autocast that it needs.

Plain training runs the whole step under autocast, the derivative of the energy in it included, and the backward pass of
the loss outside. So the casts of FE are part of a captured graph, FF differentiates under the autocast that the forward
called ``torch.autograd.grad`` under, and BF and BE run without, on the types that FE and FF left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class Autocast:
    """Describes the casts that autocast makes.

    Attributes:
        dtypes: (device type, dtype) for every type of device that autocast is on for.
    """

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def current(cls) -> Autocast:
        """Returns the autocast of this thread, as it is now."""
        available = (d for d in _DEVICE_TYPES if torch.amp.is_autocast_available(d))
        return cls(tuple((d, torch.get_autocast_dtype(d)) for d in available if torch.is_autocast_enabled(d)))

    def changed(self, device_type: str, dtype: torch.dtype | None) -> Autocast:
        """Returns the same with another dtype for one type of device; None turns autocast off there."""
        others = dict(self.dtypes)
        others.pop(device_type, None)
        return Autocast(tuple(sorted({**others, **({device_type: dtype} if dtype else {})}.items())))


OFF = Autocast()
"""No casts."""


@contextmanager
def autocast_as(wanted: Autocast) -> Iterator[None]:
    """Makes autocast do just these casts inside, and keep none: a kept cast would outlive its micro-batch's graph."""
    current = Autocast.current()
    if current == wanted:
        yield
        return
    with ExitStack() as stack:
        for device_type, _ in current.dtypes:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        for device_type, dtype in wanted.dtypes:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
        yield


def forget_casts() -> None:
    """Drops the casts of parameters that the user's autocast has kept: their graphs end with the micro-batch."""
    torch.clear_autocast_cache()
