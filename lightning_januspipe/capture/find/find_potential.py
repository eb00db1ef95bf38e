"""Finds the potential of a LightningModule: the submodule that differentiates an energy in its ``forward``.

One ordinary step of the user's module runs on a real batch under a ``TorchFunctionMode``, which sees every call of
``torch.autograd.grad``. Where the step itself makes such calls, or several submodules do, the part of the step up to
the last of them stands for the potential.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters import Adapter, adapters_of, joined
from lightning_januspipe.capture.find.grad_call import (
    PotentialCall,
    ReplacedCalls,
    StepFunction,
    as_sequence,
    call_arguments,
    grad_arguments,
)
from lightning_januspipe.capture.patches import module_hooks
from lightning_januspipe.capture.trees import copied, leaves
from lightning_januspipe.errors import WITHOUT_CAPTURE, CaptureError

_NO_WAY = ("appears to not have been used in the graph", "does not require grad")
"""Words in torch's errors for a derivative that does not exist."""


@dataclass
class _GradCall:
    stack: tuple[str, ...]
    create_graph: bool
    num_inputs: int


@dataclass
class _Returned:
    """Records the return of a module that the step itself called, not another module."""

    name: str
    output: Any
    num_grads: tuple[int, int]  # calls of torch.autograd.grad before it was called, and before it returned

    @property
    def differentiates(self) -> bool:
        """Tells whether it called torch.autograd.grad."""
        return self.num_grads[0] < self.num_grads[1]


class _StepObserver(TorchFunctionMode):
    """Records calls of ``torch.autograd.grad``, and which outputs of modules are read after the modules returned.

    Args:
        module: the LightningModule.
        potential: dotted name of the potential, where the user gave one; None for the outermost submodule.
    """

    def __init__(self, module: nn.Module, potential: str | None) -> None:
        super().__init__()
        self._names = {id(m): name for name, m in module.named_modules()}
        self._parameter_ids = {id(p): n for n, p in module.named_parameters()}
        self._potential = potential
        self._stack: list[str] = []
        self._grads_before: list[int] = []  # for each entry of the stack, the calls of grad before it
        self._output_ids: dict[int, tuple[int, int]] = {}
        self.grads: list[_GradCall] = []
        self.returned: list[_Returned] = []  # keeps outputs alive, so that their ids stay their own
        self.read: set[tuple[int, int, str]] = set()  # position in returned, position of the leaf, module that reads it
        self.parameters_read: set[tuple[str, tuple[str, ...]]] = set()  # name, and the modules that were running

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs before the forward of every module."""
        name = self._names.get(id(module))
        if name is not None:
            self._stack.append(name)
            self._grads_before.append(len(self.grads))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Runs after the forward of every module."""
        name = self._names.get(id(module))
        if name is None or not self._stack or self._stack[-1] != name:
            return
        self._stack.pop()
        before = self._grads_before.pop()
        outermost = not any(self._stack)  # the forward of the LightningModule itself may be running
        if name == self._potential if self._potential is not None else outermost:
            for i, tensor in enumerate(_tensors(output)):
                self._output_ids[id(tensor)] = len(self.returned), i
            self.returned.append(_Returned(name, output, (before, len(self.grads))))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            given = grad_arguments(args, kwargs)
            num_inputs = len(as_sequence(given["inputs"]))
            self.grads.append(_GradCall(tuple(self._stack), bool(given.get("create_graph")), num_inputs))
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if func is torch.autograd.grad and any(w in str(error) for w in _NO_WAY):
                raise CaptureError(
                    "the energy does not depend in a differentiable way on what it is differentiated by: "
                    "torch.autograd.grad found no graph between them. Look for a detach(), torch.no_grad(), .data, or "
                    "a conversion to numpy between positions (or strain) and energy."
                ) from error
            raise
        # Any code may ask for a parameter's device, dtype or shape; only reading its values counts.
        has_values = any(isinstance(x, (Tensor, float)) for x in pytree.tree_leaves(result))
        reader = next((name for name in self._stack if name), "")
        for leaf in map(id, pytree.tree_leaves((args, kwargs))):
            if leaf in self._output_ids:
                self.read.add((*self._output_ids[leaf], reader))
            if leaf in self._parameter_ids and has_values:
                self.parameters_read.add((self._parameter_ids[leaf], tuple(self._stack)))
        return result


def find_potential(
    module: nn.Module, step: StepFunction, batch: Any, potential: str | None = None, graph_size: int = 1
) -> PotentialCall:
    """Runs one step, and returns the call of the potential in it.

    Args:
        module: the LightningModule.
        step: a training (or evaluation) step of ``module``, from a batch to what it returns.
        batch: the batch that the step runs on.
        potential: dotted name of the potential, where the user gave one.
        graph_size: number of graph ranks that will share the atoms of each micro-batch.

    Raises:
        CaptureError: no energy is differentiated; the graph is not kept for the second derivative; the step
            differentiates what no submodule computes, or calls a submodule twice for it; or ``potential`` names no
            submodule, or one that differentiates nothing.
    """
    if potential is not None and potential not in dict(module.named_modules()):
        raise CaptureError(
            f"potential={potential!r} is not a submodule of {type(module).__name__}; its direct submodules are "
            f"{[n for n, _ in module.named_children()]}. Give the dotted name of the one that returns the forces."
        )
    observer = _StepObserver(module, potential)
    with module_hooks(observer.enter, observer.leave), observer:
        step(copied(batch))
    _refuse_other_calls(module, observer, potential)
    whole = (0, len(observer.grads))
    if not observer.grads[0].stack or not any(r.num_grads == whole for r in observer.returned):
        return _in_step(module, observer, batch)
    of_submodule = [r for r in observer.returned if r.num_grads == whole and r.name] if potential is None else []
    returned = (of_submodule or [r for r in observer.returned if r.num_grads == whole])[0]
    path, position = returned.name, observer.returned.index(returned)
    prefix = f"{path}." if path else ""
    inside = {f"{prefix}{n}": p.requires_grad for n, p in module.get_submodule(path).named_parameters()}
    read_outside = {name for name, running in observer.parameters_read if name in inside and path not in running}
    outside = {name for name in read_outside if inside[name] or not path}
    if path and outside:
        raise CaptureError(
            f"the step of {type(module).__name__} uses parameters of its potential {path!r} outside the potential's "
            f"forward ({', '.join(sorted(outside)[:3])}). In a pipeline every rank holds only its own stage's "
            "parameters: use weight_decay of the optimizer for regularization, or train with "
            f"{WITHOUT_CAPTURE}."
        )
    adapters = adapters_of(module.get_submodule(path), graph_size)
    of_output = {leaf for i, leaf, _ in observer.read if i == position}
    read = _read_of_joined(module.get_submodule(path), adapters, returned.output, of_output)
    args, kwargs = call_arguments(module, path, step, batch)
    # Every rank holds frozen parameters. It holds trained ones only if the step itself is the potential.
    step_parameters = tuple(sorted(name.removeprefix(prefix) for name in read_outside))
    return PotentialCall(path, args, kwargs, tuple(sorted(read)), step_parameters=step_parameters)


def _in_step(module: nn.Module, observer: _StepObserver, batch: Any) -> PotentialCall:
    """Returns the call of a step that stands for the potential, up to its last ``torch.autograd.grad``."""
    name, num_grads = type(module).__name__, len(observer.grads)
    before = [r for r in observer.returned if r.num_grads[0] < num_grads and (r.differentiates or _has_graph(r.output))]
    whole = [r for r in before if not r.name]  # the LightningModule's own forward
    outer = whole or before
    names = [r.name for r in outer]
    if not names:
        raise CaptureError(
            f"the step of {name} calls torch.autograd.grad on an energy that no submodule returned. Compute the energy "
            "in the forward of a submodule (an nn.Module that returns it), and call that in the step."
        )
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise CaptureError(
            f"the step of {name} calls {twice or 'its own forward'!r} twice for what it differentiates; each submodule "
            "can be called once. Concatenate the two batches, or give each call a module of its own."
        )
    num_inputs = tuple(g.num_inputs for g in observer.grads if not any(n in g.stack for n in names))
    position = sum(num_inputs)
    read = set(range(position))
    for returned in outer:
        index = observer.returned.index(returned)
        read |= {position + leaf for i, leaf, reader in observer.read if i == index and reader not in names}
        position += len(_tensors(returned.output))
    inside = {f"{n}." for n in names} if "" not in names else {""}
    parameters = {p for p, running in observer.parameters_read if not any(n in running for n in names)}
    # Parameters of submodules that are called for the loss alone are read there only.
    own = {p for p in parameters if any(p.startswith(n) for n in inside)} | {
        p for p, running in observer.parameters_read if not any(running)
    }
    replaced = ReplacedCalls(tuple(names), num_inputs)
    return PotentialCall("", (batch,), {}, tuple(sorted(read)), replaced, tuple(sorted(own)))


def _read_of_joined(potential: nn.Module, adapters: Sequence[Adapter], returned: Any, read: set[int]) -> set[int]:
    """Returns which tensors of the traced call's return value the step reads; adapters may join tensors of a list."""
    if not adapters:
        return read
    places = [p for p, x in leaves(returned) if isinstance(x, Tensor)]
    traced = [p for p, x in leaves(joined(adapters, potential, returned)) if isinstance(x, Tensor)]
    found = [[k for k, p in enumerate(traced) if f"{places[i]}[".startswith((f"{p}[", f"{p}."))] for i in read]
    return {k for those in found for k in those or range(len(traced))}


def _has_graph(output: Any) -> bool:
    return any(x.requires_grad for x in _tensors(output))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for _, x in leaves(tree) if isinstance(x, Tensor)]


def evaluation_call(module: nn.Module, step: StepFunction, call: PotentialCall, batch: Any) -> PotentialCall:
    """Returns a step's call of the potential in evaluation mode, where arguments such as ``training`` differ.

    Args:
        module: the LightningModule.
        step: its evaluation step.
        call: the call in training.
        batch: the batch of the call in training. A step that fails on it is assumed to call as in training.
    """
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        args, kwargs = call_arguments(module, call.path, step, batch, call.replaced is not None)
    except Exception:
        return call
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
    return replace(call, args=args, kwargs=kwargs)


def _refuse_other_calls(module: nn.Module, observer: _StepObserver, potential: str | None) -> None:
    """Raises the error that says what is wrong with the calls of ``torch.autograd.grad`` that were seen."""
    grads = observer.grads
    if not grads:
        raise CaptureError(
            f"the step of {type(module).__name__} never called torch.autograd.grad, so no forces -dE/dr were found. "
            "The januspipe strategy trains conservative potentials; compute forces with "
            "torch.autograd.grad(energy, positions, create_graph=True), or use another strategy for direct-force "
            "models."
        )
    places = [next((n for n in g.stack if n), "the step itself") for g in grads]
    if potential is not None and not any(r.differentiates for r in observer.returned):
        raise CaptureError(
            f"potential={potential!r} was named, but torch.autograd.grad is called in {places[0]!r}. "
            + (f"Pass potential={places[0]!r}, or leave it out" if any(grads[0].stack) else "Leave it out")
            + " to have it found."
        )
    if not all(g.create_graph for g in grads) and module.training:
        raise CaptureError(
            f"the potential {places[0]!r} is not twice differentiable in training: torch.autograd.grad was "
            "called without create_graph=True, so a force loss gives no parameter gradients. Pass "
            "create_graph=self.training."
        )
