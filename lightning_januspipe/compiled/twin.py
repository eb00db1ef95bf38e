"""Compares the compiled phases of a micro-batch with the same phases run eagerly, on the values of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.capture.validate.against_eager import smallest_scale
from lightning_januspipe.engine.autocast import Autocast
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.schedule.actions import Phase

Results = Sequence[Sequence[Tensor]]
"""What a phase returns: lists of tensors of one kind."""


class EagerTwin:
    """Runs the phases of one micro-batch eagerly, and compares what they return with what compiled phases returned.

    The phases get the same messages. A micro-batch takes the memory of both meanwhile.

    Where exchanges round rows, the last digit of a sum may decide how a number is rounded. So compiled phases then run
    a second time for the comparison, with rows that travel as they are, as those of the eager phases do.

    Args:
        function: the stage.
        autocast: what FF differentiates under.
        tolerance: the largest difference that rounding explains, relative to the scale of a value.
        values: what the stage reads, with its exchanges.
        make_compiled: makes the stage that runs the compiled phases, with buffers for its parameter gradients.

    Attributes:
        gradients: takes the parameter gradients of the compiled phases that training goes on with.
    """

    def __init__(
        self,
        function: StageFunction,
        autocast: Autocast,
        tolerance: float,
        values: Sequence[Any],
        make_compiled: Callable[[GradientBuffers], Stage],
    ) -> None:
        self._function, self._tolerance = function, tolerance
        self._expected, self._found = GradientBuffers(), GradientBuffers()
        self._eager = Stage(function, self._expected, autocast)
        self._rounding = [v for v in values if not isinstance(v, Tensor) and getattr(v, "half", None) is not None]
        self._compiled = make_compiled(self._found) if self._rounding else None
        self.gradients = GradientBuffers() if self._rounding else self._found

    def run(self, phase: Phase, run_with: Callable[[Stage], Results | None], found: Results = ()) -> None:
        """Runs a phase eagerly, and compares what it returns.

        Args:
            phase: the phase.
            run_with: runs the phase with a stage.
            found: what the compiled phase returned.

        Raises:
            CaptureError: they differ.
        """
        with _unrounded(self._rounding):
            exact = found if self._compiled is None else run_with(self._compiled)
            self._compare_all(phase, run_with(self._eager) or (), exact or ())

    def _compare_all(self, phase: Phase, expected: Results, found: Results) -> None:
        for kind_expected, kind_found in zip(expected, found, strict=True):
            floor = smallest_scale(kind_expected, self._tolerance)
            for place, (a, b) in enumerate(zip(kind_expected, kind_found, strict=True)):
                self._compare(f"value {place} that {phase.value} returns", a, b, max(_scale(a), floor))

    def finish(self) -> None:
        """Compares the parameter gradients, after the last phase.

        Raises:
            CaptureError: they differ, or other parameters have one.
        """
        parameters = self._function.parameters
        scale = max((_scale(g) for g in self._expected.sums()), default=0.0)
        for place, parameter in enumerate(parameters):
            a, b = self._expected.get(parameter), self._found.get(parameter)
            what = f"the gradient of parameter {place} of {len(parameters)}, of shape {tuple(parameter.shape)},"
            if (a is None) != (b is None):
                missing = "missing" if b is None else "there, though the loss does not depend on the parameter"
                raise self._error(f"{what} is {missing}")
            if a is not None and b is not None:
                self._compare(what, a, b.to(a.dtype), scale)  # sums of half precision are kept in float32

    def _compare(self, what: str, expected: Tensor, found: Tensor, scale: float) -> None:
        if expected.shape != found.shape or expected.dtype != found.dtype:
            given = f"{tuple(found.shape)} and {found.dtype}"
            raise self._error(f"{what} has {given} instead of {tuple(expected.shape)} and {expected.dtype}")
        if not (expected.is_floating_point() or expected.is_complex()):
            if not torch.equal(expected, found):
                raise self._error(f"{what} has other values")
            return
        no_numbers = ~(expected.isfinite() | found.isfinite())
        difference = (expected - found).abs().masked_fill(no_numbers, 0.0)
        error = float(difference.max()) if difference.numel() else 0.0
        if not error <= self._tolerance * max(scale, 1e-300):
            raise self._error(f"{what} differs by {error:.2e} at a scale of {scale:.2e}")

    def _error(self, what: str) -> CaptureError:
        return CaptureError(
            f"stage {self._function.index}, compiled, computes something else than the same stage run eagerly, on its "
            f"first micro-batch: {what}. Train with compile=False, and report this potential."
        )


@contextmanager
def _unrounded(exchanges: Sequence[Any]) -> Iterator[None]:
    """Lets exchanges send rows as they are."""
    halves = [exchange.half for exchange in exchanges]
    try:
        for exchange in exchanges:
            exchange.half = None
        yield
    finally:
        for exchange, half in zip(exchanges, halves, strict=True):
            exchange.half = half


def _scale(tensor: Tensor) -> float:
    """Returns the largest finite entry."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(tensor.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())
