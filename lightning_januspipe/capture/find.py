"""Find the potential of a LightningModule: the submodule that differentiates an energy in its ``forward``.

One ordinary step of the user's module is run on a real batch under a ``TorchFunctionMode``, which sees the call of
``torch.autograd.grad`` however it was imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.errors import CaptureError


@dataclass
class PotentialCall:
    """One call of the potential, as the user's step made it.

    Attributes:
        path: dotted name of the potential inside the LightningModule.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        read_outputs: positions of those leaves of the returned pytree that the step read afterwards.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read_outputs: tuple[int, ...] = ()


class ReachedPotential(Exception):
    """Unwinds the user's step at the call of the potential, carrying the call's arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_call = args
        self.kwargs_of_call = kwargs


@dataclass
class _GradCall:
    stack: tuple[str, ...]
    create_graph: bool


def as_sequence(value: Any) -> list[Tensor]:
    """A tensor or a sequence of tensors, as ``torch.autograd.grad`` takes them, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def grad_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of ``torch.autograd.grad`` by name."""
    names = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _Watch(TorchFunctionMode):
    """Records calls of ``torch.autograd.grad`` and, after the potential returned, which of its outputs are read.

    Args:
        module: the LightningModule.
        potential: dotted name of the potential, where the user gave one; else it is the outermost submodule.
    """

    def __init__(self, module: nn.Module, potential: str | None) -> None:
        super().__init__()
        self._names = {id(m): name for name, m in module.named_modules() if name}
        self._parameter_ids = {id(p): n for n, p in module.named_parameters()}
        self._potential = potential
        self._stack: list[str] = []
        self._grads_before: list[int] = []  # for each entry of the stack, how many grad calls preceded it
        self._output_ids: dict[int, int] = {}
        self.grads: list[_GradCall] = []
        self.returned: list[tuple[str, Any]] = []  # outputs are kept alive, so that their ids stay their own
        self.read: set[int] = set()
        self.parameters_read: set[tuple[str, tuple[str, ...]]] = set()  # with the modules that were running

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of every module."""
        name = self._names.get(id(module))
        if name is not None:
            self._stack.append(name)
            self._grads_before.append(len(self.grads))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of every module."""
        name = self._names.get(id(module))
        if name is None or not self._stack or self._stack[-1] != name:
            return
        self._stack.pop()
        differentiated = len(self.grads) > self._grads_before.pop()
        if differentiated and (name == self._potential if self._potential is not None else not self._stack):
            leaves = pytree.tree_leaves(output)
            self._output_ids = {id(x): i for i, x in enumerate(leaves) if isinstance(x, Tensor)}
            self.returned.append((name, output))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            given = grad_arguments(args, kwargs)
            self.grads.append(_GradCall(tuple(self._stack), bool(given.get("create_graph"))))
        result = func(*args, **kwargs)
        # A parameter's device, dtype or shape may be asked for anywhere; only its values may not.
        has_values = any(isinstance(x, (Tensor, float)) for x in pytree.tree_leaves(result))
        for leaf in map(id, pytree.tree_leaves((args, kwargs))):
            if leaf in self._output_ids:
                self.read.add(self._output_ids[leaf])
            if leaf in self._parameter_ids and has_values:
                self.parameters_read.add((self._parameter_ids[leaf], tuple(self._stack)))
        return result


def find_potential(module: nn.Module, run_step: Callable[[], Any], potential: str | None = None) -> PotentialCall:
    """Run one step and return the call of the potential made in it.

    Args:
        module: the LightningModule.
        run_step: runs one training (or evaluation) step of ``module`` on a batch and returns what the step returned.
        potential: dotted name of the potential, where the user gave one.

    Raises:
        CaptureError: no energy is differentiated; two are; the call is in the step itself; it does not keep the graph
            for the second derivative; or ``potential`` names no submodule, or one that differentiates nothing.
    """
    if potential is not None and potential not in dict(module.named_modules()):
        raise CaptureError(
            f"potential={potential!r} is not a submodule of {type(module).__name__}; its direct submodules are "
            f"{[n for n, _ in module.named_children()]}. Give the dotted name of the one that returns the forces."
        )
    watch = _Watch(module, potential)
    with _global_hooks(watch.enter, watch.leave), watch:
        run_step()
    path = _judge(module, watch.grads, [name for name, _ in watch.returned], potential)
    inside = {f"{path}.{n}" for n, _ in module.get_submodule(path).named_parameters()}
    outside = {name for name, running in watch.parameters_read if name in inside and path not in running}
    if outside:
        raise CaptureError(
            f"the step of {type(module).__name__} uses parameters of its potential {path!r} outside the potential's "
            f"forward ({', '.join(sorted(outside)[:3])}). In a pipeline every rank holds only its own stage's "
            "parameters: use weight_decay of the optimizer for regularization, or train with pipeline_size=1."
        )
    args, kwargs = call_arguments(module, path, run_step)
    return PotentialCall(path, args, kwargs, tuple(sorted(watch.read)))


def call_arguments(module: nn.Module, path: str, run_step: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the user's step up to its call of the potential and return that call's arguments; nothing after it runs."""
    submodule = module.get_submodule(path)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise ReachedPotential(args, kwargs)

    handle = submodule.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_step()
    except ReachedPotential as reached:
        return reached.args_of_call, reached.kwargs_of_call
    finally:
        handle.remove()
    raise CaptureError(
        f"the step of {type(module).__name__} did not call its potential {path!r} for this batch. Every batch has to "
        "go through the potential; skip unwanted batches in the dataset or its sampler."
    )


def _judge(
    module: nn.Module,
    grads: list[_GradCall],
    called: list[str],
    potential: str | None,
) -> str:
    """The potential's path, or the error that says what is wrong with the calls that were seen."""
    step = f"the step of {type(module).__name__}"
    if not grads:
        raise CaptureError(
            f"{step} never called torch.autograd.grad, so no forces -dE/dr were found. The januspipe strategy trains "
            "conservative potentials; compute forces with torch.autograd.grad(energy, positions, create_graph=True) "
            "in the forward of a submodule, or use another strategy for direct-force models."
        )
    outside = [g for g in grads if not g.stack]
    if outside:
        raise CaptureError(
            f"{step} calls torch.autograd.grad itself, outside every submodule. Move the energy and its derivative "
            "into the forward of one submodule (an nn.Module that returns energy and forces) and call that."
        )
    if potential is not None and potential not in called:
        raise CaptureError(
            f"potential={potential!r} was named, but torch.autograd.grad is called in {grads[0].stack[0]!r}. "
            f"Pass potential={grads[0].stack[0]!r}, or leave it out to have it found."
        )
    if len(grads) > 1:
        places = ", ".join(repr(g.stack[0]) for g in grads)
        raise CaptureError(
            f"{step} differentiates {len(grads)} times (in {places}); exactly one torch.autograd.grad call in one "
            "call of the potential can be pipelined. Ask for all derivatives in one call, e.g. "
            "torch.autograd.grad(energy.sum(), [positions, strain], create_graph=True)."
        )
    if not grads[0].create_graph and module.training:
        raise CaptureError(
            f"the potential {grads[0].stack[0]!r} is not twice differentiable in training: torch.autograd.grad was "
            "called without create_graph=True, so a force loss gives no parameter gradients. Pass "
            "create_graph=self.training."
        )
    return called[0]


@contextmanager
def _global_hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Module hooks on every module for the duration of the block."""
    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
