"""Measures the time of phases without the work that only their measurement needs."""

from __future__ import annotations

import time

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class UntimedWork(TorchDispatchMode):
    """Does work between operations that is not counted in the times of phases, such as reading values from a file.

    Attributes:
        seconds: The time of this work so far.
    """

    seconds = 0.0


def clock() -> float:
    """Returns seconds since some moment, without the untimed work of the modes that are active now."""
    untimed = sum(mode.seconds for mode in _get_current_dispatch_mode_stack() if isinstance(mode, UntimedWork))
    return time.perf_counter() - untimed
