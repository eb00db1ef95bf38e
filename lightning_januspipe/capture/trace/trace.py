"""Traces a potential, its call of ``torch.autograd.grad`` included, to one functional graph with symbolic sizes.

While tracing, one opaque operator replaces that call, so the graph shows the differentiated energy and coordinates.
Everything before the operator computes the energy; everything after it is the epilogue (signs, volumes, outputs).
"""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters import Adapter, joined
from lightning_januspipe.capture.find.call_format import CallFormat, call_leaves
from lightning_januspipe.capture.find.grad_call import PotentialCall, as_sequence, grad_arguments
from lightning_januspipe.capture.patches import quiet_loggers
from lightning_januspipe.capture.trace.autocast_casts import has_casts, make_casts_explicit
from lightning_januspipe.capture.trace.from_export import program_from_export
from lightning_januspipe.capture.trace.program import SLOT, Program, returned_leaf
from lightning_januspipe.capture.trace.random_draws import ShownDropout
from lightning_januspipe.capture.trace.read_values import ReadValues, eager_branches, line_of_user, symbolic_sizes
from lightning_januspipe.capture.trace.torchscript import inlined_torchscript
from lightning_januspipe.capture.trace.triangles import SymbolicTriangles
from lightning_januspipe.capture.trees import leaves, with_leaves
from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as
from lightning_januspipe.errors import CaptureError, in_one_line, quoted

_LIBRARY = "januspipe"


@torch.library.custom_op(f"{_LIBRARY}::energy_gradient", mutates_args=())
def energy_gradient(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Stands for ``torch.autograd.grad(outputs, inputs)`` in a traced graph; it is never run."""
    raise NotImplementedError("energy_gradient marks a place in a traced graph and is never run")


@energy_gradient.register_fake
def _(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


class _MarkGrad(TorchFunctionMode):
    """Replaces ``torch.autograd.grad`` by :func:`energy_gradient`, and keeps the autocast of that call."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = OFF

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            self.autocast = Autocast.current()
            given = grad_arguments(args, kwargs)
            outputs = as_sequence(given["outputs"])
            seeds = given.get("grad_outputs")
            if seeds is not None:
                outputs = [
                    o if s is None else (o * s.detach()).sum() for o, s in zip(outputs, as_sequence(seeds), strict=True)
                ]
            return tuple(torch.ops.januspipe.energy_gradient(outputs, as_sequence(given["inputs"])))
        return func(*args, **kwargs)


class _GiveZeros(TorchFunctionMode):
    """Answers ``torch.autograd.grad`` with zeros, so that autograd itself reads no values from tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            return tuple(torch.zeros_like(x) for x in as_sequence(grad_arguments(args, kwargs or {})["inputs"]))
        return func(*args, **(kwargs or {}))


class _TracedCall(nn.Module):
    """Runs the potential as a function of the tensors of its call, so that nothing else is an input.

    Args:
        potential: the module whose forward is traced.
        call: its call, with the arguments that its adapters made.
        form: the format of its calls.
        adapters: the adapters of its package.
        values: values that the forward reads from tensors; carriers of the integers among them are the last inputs.
        record: called with the returned tree, with :data:`SLOT` for its tensors; the number of tensors in it; and the
            autocast under which the energy was differentiated.
    """

    def __init__(
        self,
        potential: nn.Module,
        call: PotentialCall,
        form: CallFormat,
        adapters: Sequence[Adapter],
        values: ReadValues,
        record: Callable[..., None],
    ) -> None:
        super().__init__()
        self.potential = potential
        # Export restores attributes after tracing, so the record is kept outside of this module.
        self._given = (call, form, adapters, values, record)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        call, form, adapters, values, record = self._given
        num_own = len(tensors) - len(values.sizes)
        args, kwargs = form.unbind(call.args, call.kwargs, list(tensors[:num_own]))
        values.begin(tensors)
        with ShownDropout(), SymbolicTriangles(), _MarkGrad() as mark:
            output = joined(adapters, self.potential, self.potential(*args, **kwargs))
        found = [x for _, x in leaves(output) if isinstance(x, Tensor)]
        record(with_leaves(output, lambda _, x: SLOT if isinstance(x, Tensor) else x), len(found), mark.autocast)
        return [*found, *values.size_sources, *values.fixed_sources, *values.constant_sources]


def trace_potential(
    potential: nn.Module, call: PotentialCall, form: CallFormat | None = None, adapters: Sequence[Adapter] = ()
) -> Program:
    """Traces one call of a potential; applies no pass of :mod:`~lightning_januspipe.capture.passes`.

    Args:
        potential: the submodule found by :func:`find_potential`, left as it is.
        call: arguments with at least two structures of different sizes, so that no size looks like a constant.
        form: the format of its calls.
        adapters: the adapters of its package; ``call`` has the arguments that they made.

    Returns:
        The functional program of energy and epilogue.

    Raises:
        CaptureError: the forward cannot be traced with symbolic sizes, or updates buffers.
    """
    form = form or CallFormat.of(call.args, call.kwargs)
    if not form.tensors:
        found = {place: type(leaf).__name__ for place, leaf in call_leaves(call.args, call.kwargs).items()}
        raise CaptureError(
            f"the potential {quoted(call.path)} ({type(potential).__name__}) is called without tensors: its arguments "
            f"hold {found}. Tensors are searched in dicts, lists, tuples and attributes of objects: let the dataset "
            "or collate_fn make tensors of what the forward converts, or write an adapter whose arguments() does."
        )
    returned: list[tuple[Any, int, Autocast]] = []
    values = ReadValues(potential)
    wrapper = _TracedCall(potential, call, form, adapters, values, lambda *record: returned.append(record))
    wrapper.training = potential.training  # train() would also change submodules that the user keeps in evaluation mode
    try:
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(adapter.tracing(potential))
            stack.enter_context(inlined_torchscript(potential))
            stack.enter_context(eager_branches(potential, (call.args, call.kwargs)))
            stack.enter_context(symbolic_sizes(potential, (call.args, call.kwargs), values))
            stack.enter_context(torch.enable_grad())
            # Positions may already require a gradient; stages make the leaves, so the traced inputs are constants.
            tensors = [t.detach() for t in form.bind(call.path, call.args, call.kwargs)]
            _run_once(potential, call, form, tensors, values)
            tensors += values.carriers(tensors[0].device)
            stack.enter_context(_quiet())
            stack.enter_context(symbolic_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
            stack.enter_context(_selections_have_entries())
            exported = _exported(wrapper, tensors, form)
            ambient = Autocast.current()
            if ambient != OFF or has_casts(exported):
                make_casts_explicit(exported, ambient)
            if _needs_functionalization(exported):
                with autocast_as(OFF):
                    exported = exported.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the potential {quoted(call.path)} ({type(potential).__name__}) cannot be traced with symbolic sizes: "
            f"{in_one_line(error)}{_place(error)}. Usual causes: Python branches on tensor "
            "values, tensor.tolist(), .numpy() or float(tensor) in the forward, or shapes that depend on values "
            "(nonzero, unique, masks as indices)."
        ) from error
    _refuse_state(exported, call.path)
    tree, num_outputs, autocast = returned[-1]
    tree = with_leaves(tree, lambda _, leaf: returned_leaf(leaf))
    program = program_from_export(
        exported,
        tree,
        num_outputs,
        prefix="potential.",
        num_sizes=len(values.sizes),
        fixed_values=values.fixed,
        constant_sizes=values.constants,
        frozen={n for n, p in potential.named_parameters(remove_duplicate=False) if not p.requires_grad},
    )
    program.autocast = autocast
    # Export may choose any name of a shared parameter; named_parameters() has the first one.
    first = {p: name for name, p in potential.named_parameters()}
    named = dict(potential.named_parameters(remove_duplicate=False))
    program.parameters = {placeholder: first[named[name]] for placeholder, name in program.parameters.items()}
    return program


def _exported(wrapper: _TracedCall, tensors: list[Tensor], form: CallFormat) -> ExportedProgram:
    """Exports with symbolic sizes, except for sizes of 1 that broadcast.

    A size that is 1 in both example batches is a constant, except in the first dimension. If the export fails, such
    sizes of first dimensions are constants too: a batch of one structure may broadcast against atoms, for example.
    """
    ways = dict.fromkeys((frozenset(p for p in form.ones if p[1] > 0), form.ones))
    for ones in ways:
        fixed = {(form.tensors.index(place), dim) for place, dim in ones}
        shapes = tuple(
            {d: Dim.STATIC if (i, d) in fixed else Dim.AUTO for d in range(t.dim())} for i, t in enumerate(tensors)
        )
        try:
            return export(wrapper, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
        except CaptureError:
            raise
        except Exception:
            if ones == form.ones:
                raise
    raise AssertionError("the last attempt returns or raises")


def _run_once(
    potential: nn.Module, call: PotentialCall, form: CallFormat, tensors: list[Tensor], values: ReadValues
) -> None:
    """Runs the forward eagerly, without its derivative, to find the values that it reads from tensors."""
    values.begin(None)
    args, kwargs = form.unbind(call.args, call.kwargs, tensors)
    with _GiveZeros():
        potential(*args, **kwargs)


def _needs_functionalization(exported: ExportedProgram) -> bool:
    """Tells whether the graph mutates a tensor or nests graphs, which a cut that follows data flow would drop."""
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return True
    return False


def _refuse_state(exported: ExportedProgram, path: str) -> None:
    mutated = list(exported.graph_signature.buffers_to_mutate.values())
    if mutated:
        raise CaptureError(
            f"the potential {quoted(path)} updates buffers in its forward ({', '.join(mutated[:3])}), which has no "
            "meaning while several micro-batches are in flight. Update them in a hook outside forward, or freeze them."
        )


def _place(error: BaseException) -> str:
    line = line_of_user(traceback.extract_tb(error.__traceback__))
    return f" (at {line})" if line else ""


@contextmanager
def _selections_have_entries() -> Iterator[None]:
    """Answers branches on the length of a selection by a mask (``if len(pairs) == 0``) as for two or more entries.

    A batch that selects fewer is one of a new kind, which is compared with the module itself.
    """
    own = SymNode.guard_bool

    def guard_bool(node: SymNode, file: str, line: int) -> bool:
        try:
            return own(node, file, line)
        except GuardOnDataDependentSymNode:
            return node.guard_size_oblivious(file, line)

    with mock.patch.object(SymNode, "guard_bool", guard_bool):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides export's logs of dimensions that it makes constant, and the whole graph that it prints on failure.

    The sizes that a program accepts and the validation on other sizes judge the first; the error names the line.
    """
    names = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")
    with quiet_loggers(names, logging.ERROR), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
