"""Runs the parts of a stage on made-up tensors, to find what a trace of them does not show.

A trace holds operations and no derivatives, is made in one mode, and for sizes above 1. A part may have a derivative of
its own, do something else in evaluation, or take another branch where there is one structure, or no edge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.trace.program import symbols_in
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError

Run = Callable[..., Sequence[Tensor]]
"""Computes the features that a stage returns, from its inputs and the features that it received."""


@dataclass(frozen=True)
class Trial:
    """Holds the parts of a stage, and makes tensors to run them on.

    Attributes:
        parts: the module that holds the parts.
        run: runs them.
        specs: the specs of the inputs and of the features received.
        coordinates: the specs of the differentiation inputs.
        device: the device that the stage runs on.
    """

    parts: nn.Module
    run: Run
    specs: Sequence[TensorSpec]
    coordinates: Sequence[TensorSpec]
    device: torch.device

    def tensors(self, sizes: Mapping[str, int]) -> list[Tensor]:
        """Returns tensors for some sizes: integers are zeros, which are valid as indices, and matrices are regular."""
        generator = torch.Generator().manual_seed(0)
        return [_made_up(spec, sizes, generator).to(self.device) for spec in self.specs]

    def refuse_changed_derivatives(self, sizes: Mapping[str, int]) -> None:
        """Raises an error if derivatives of the parts are not those of their operations.

        Args:
            sizes: values of the size symbols.

        Raises:
            CaptureError: they are not; the message says why.
        """
        with _derivatives_changed() as changed:
            self.run(*self.tensors(sizes))
        if changed:
            raise CaptureError(f"its parts {changed[0]}, which a trace does not show")

    def refuse_another_evaluation(self, sizes: Mapping[str, int]) -> None:
        """Raises an error if the parts compute something else in evaluation mode.

        Args:
            sizes: values of the size symbols.

        Raises:
            CaptureError: they do.
        """
        tensors = self.tensors(sizes)
        expected = self.run(*tensors)
        with _in_evaluation(self.parts):
            found = self.run(*tensors)
        if not _agree(expected, found):
            raise CaptureError("its parts compute something else in evaluation mode")

    def sizes_that_differ(self, traced: Run, sizes: Mapping[str, int]) -> list[str]:
        """Returns the conditions on sizes of 0 and 1 without which a trace is not what the parts compute.

        Args:
            traced: runs the trace.
            sizes: values of the size symbols, all above 1.
        """
        found = [f"Ne({symbol}, 1)" for symbol in sizes if not self._agrees(traced, {**sizes, symbol: 1})]
        # Indices look up atoms and structures, which each batch has.
        always = {s for spec in self.coordinates for size in spec.shape for s in symbols_in(size)}
        others = [symbol for symbol in sizes if symbol not in always]
        # On a GPU, an index that is out of range ends the process.
        if self.device.type != "cpu" or not self._agrees(traced, {**sizes, **dict.fromkeys(others, 0)}):
            found += [f"Ne({symbol}, 0)" for symbol in others]
        return found

    def _agrees(self, traced: Run, sizes: Mapping[str, int]) -> bool:
        tensors = self.tensors(sizes)
        try:
            return _agree(self.run(*tensors), traced(*tensors))
        except Exception:  # the parts are code of the user's, and may not run for such sizes
            return False


def _made_up(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = spec.sizes(sizes)
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return torch.zeros(shape, dtype=spec.dtype)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    if len(shape) > 1 and shape[-1] == shape[-2]:
        values = torch.eye(shape[-1], dtype=torch.float64) + 0.1 * values
    return values.to(spec.dtype)


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return all(_are_close(a, b) for a, b in zip(expected, found, strict=True))


def _are_close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, found)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    scale = float(expected.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if expected.numel() else 0.0
    return torch.allclose(expected, found, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@contextmanager
def _in_evaluation(parts: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in parts.modules()}
    parts.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class _GradientsWatched(TorchFunctionMode):
    """Notes calls that change gradients, in words."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Collection[Any], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.register_hook:
            self._found.append("change gradients in a hook (register_hook)")
        elif isinstance(result, Tensor) and result.is_floating_point() and not torch.is_grad_enabled():
            self._found.append("switch gradients off (torch.no_grad)")
        return result


@contextmanager
def _derivatives_changed() -> Iterator[list[str]]:
    """Yields a list of what changes derivatives inside the block, in words."""
    found: list[str] = []
    apply = vars(torch.autograd.Function)["apply"].__func__

    def noting(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.partition(".")[0] != "torch":
            found.append(f"have a derivative of their own (the torch.autograd.Function {cls.__qualname__})")
        return apply(cls, *args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(noting)), _GradientsWatched(found):
        yield found
