"""Turns an exported program into a captured program, which is plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lightning_januspipe.capture.trace.derivatives import merge_derivatives
from lightning_januspipe.capture.trace.fixed_values_and_draws import FixedValue
from lightning_januspipe.capture.trace.graph_walks import descendants
from lightning_januspipe.capture.trace.program import GRADIENT_OP, LARGEST_SIZE, Node, Program, Ref, refs
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError


def program_from_export(
    exported: ExportedProgram,
    returned: Any,
    num_outputs: int,
    prefix: str,
    num_sizes: int = 0,
    fixed_values: Sequence[FixedValue] = (),
    constant_sizes: Mapping[int, FixedValue] = MappingProxyType({}),
    frozen: Collection[str] = (),
) -> Program:
    """Returns the captured program of an exported program, in which :func:`energy_gradient` stands for derivatives.

    Args:
        exported: a functional program.
        returned: the tree that the traced forward returns, with :data:`SLOT` for its tensors.
        num_outputs: number of tensors in that tree; they are the program's first outputs.
        prefix: what precedes the name of every parameter and buffer in the exported program.
        num_sizes: number of integers that the forward reads from tensors; the last inputs carry them. The next outputs
            are those that change from batch to batch.
        fixed_values: other values that the forward reads from tensors; they are the next outputs.
        constant_sizes: position among the integers -> fixed value, for those that are the same for every batch; they
            are the last outputs. Their inputs are left out, as no operation reads them.
        frozen: names of parameters that are not trained.

    Raises:
        CaptureError: the graph holds an operation that cannot be replayed, or not exactly one derivative.
    """
    signature = exported.graph_signature
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    for spec in signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.PARAMETER:
            parameters[name] = str(spec.target).removeprefix(prefix)
        elif spec.kind is InputKind.BUFFER:
            buffers[name] = str(spec.target).removeprefix(prefix)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            value = exported.constants[str(spec.target)]
            assert isinstance(value, Tensor)
            constants[name] = value.detach().clone()
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise CaptureError(f"the traced potential has an input of kind {spec.kind} ({name}), which is not handled")
    without_use = {inputs[len(inputs) - num_sizes + i] for i in constant_sizes}
    inputs = [name for name in inputs if name not in without_use]
    nodes = [_node(n) for n in exported.graph.nodes if n.op in ("placeholder", "call_function")]
    nodes = [n for n in nodes if not _is_assertion(n) and n.name not in without_use]
    marks = [n for n in nodes if n.target == GRADIENT_OP]
    if not marks:
        raise CaptureError("the traced potential does not differentiate an energy; one torch.autograd.grad is expected")
    if len(marks) > 1:
        nodes = merge_derivatives(nodes, marks)
    user_outputs = [s.arg.name for s in signature.output_specs if s.kind.name == "USER_OUTPUT"]
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    symbols: dict[str, tuple[int, int]] = {}
    for position, name in enumerate(inputs):
        value = placeholders[name].meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and str(size.node.expr).isidentifier():
                symbols.setdefault(str(size.node.expr), (position, dim))
    first_fixed = num_outputs + num_sizes - len(constant_sizes)
    of_fixed = zip(user_outputs[first_fixed:], [*fixed_values, *constant_sizes.values()], strict=True)
    program = Program(
        nodes=nodes,
        parameters=parameters,
        buffers=buffers,
        constants=constants,
        inputs=inputs,
        energies=[r.name for r in refs(marks[0].args[0])],
        coordinates=[r.name for r in refs(marks[0].args[1])],
        gradient=marks[0].name,
        outputs=user_outputs[:num_outputs],
        returned=returned,
        sizes=user_outputs[num_outputs:first_fixed],
        fixed_values=list(of_fixed),
        symbols=symbols,
    )
    _refuse_trained_facts(program, frozen)
    _leave_out_constants(program)
    program.limits = _limits(program, exported)
    if inputs:
        shape_env = placeholders[inputs[0]].meta["val"].fake_mode.shape_env
        program.guards, program.equal_sizes = _guards(program, shape_env), _equal_sizes(shape_env)
    return program


def _refuse_trained_facts(program: Program, frozen: Collection[str]) -> None:
    trained = {placeholder for placeholder, name in program.parameters.items() if name not in frozen}
    changing = descendants(program, {*trained, program.gradient})
    for name, fixed in program.fixed_values:
        if name in changing:
            raise CaptureError(
                f"the forward reads the value {fixed.value!r} from a tensor that depends on parameters or on the "
                f"derivative ({fixed.place}), so that it changes in training. Use torch.where instead of a branch, or "
                "check such values outside of the forward."
            )


def _leave_out_constants(program: Program) -> None:
    """Leaves out values that are computed from nothing that can change."""
    changing = descendants(program, {*program.parameters, *program.buffers, *program.inputs, program.gradient})
    program.fixed_values = [(name, fixed) for name, fixed in program.fixed_values if name in changing]


def _limits(program: Program, exported: ExportedProgram) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns the sizes for which the trace is right: Python branches on sizes, and sizes made constants, limit them.

    Ranges that exclude no more than 0 and 1 are left out: they come from operations with a case for empty tensors, and
    from models that branch on a single structure only to squeeze a dimension.
    """
    limits: dict[tuple[int, int], tuple[int, int]] = {}
    for position, name in enumerate(program.inputs):
        spec = program.by_name[name].spec
        for dim, size in enumerate(spec.shape if spec is not None else ()):
            if isinstance(size, int):
                limits[position, dim] = (size, size)
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in program.symbols:
            lower = int(bounds.lower) if bounds.lower > 2 else 0
            upper = int(bounds.upper) if bounds.upper < LARGEST_SIZE else LARGEST_SIZE
            if lower or upper < LARGEST_SIZE:
                limits[program.symbols[str(symbol)]] = (lower, upper)
    return limits


def _guards(program: Program, shape_env: Any) -> list[str]:
    """Returns the relations between sizes that the trace assumed, such as ``num_edges > 2 * num_atoms`` in an ``if``.

    Args:
        program: the captured program.
        shape_env: the trace's record of symbolic sizes.
    """
    found = [shape_env.replace(guard.expr) for guard in shape_env.guards]
    known = set(program.symbols)
    return list(dict.fromkeys(str(e) for e in found if e.free_symbols and {str(s) for s in e.free_symbols} <= known))


def _equal_sizes(shape_env: Any) -> list[tuple[str, str]]:
    """Returns pairs of size symbols that the trace assumed to be equal, one a length that depends on values."""
    found = [a for of_symbol in shape_env.deferred_runtime_asserts.values() for a in of_symbol]
    asserted = [shape_env.replace(a.expr) for a in found]
    return [(str(e.lhs), str(e.rhs)) for e in asserted if e.is_Equality and e.lhs.is_Symbol and e.rhs.is_Symbol]


def _is_assertion(node: Node) -> bool:
    """Tells whether an operation is a run-time check of export, which the validation on other sizes replaces."""
    text = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(s in text for s in ("_assert", "sym_constrain_range", "_guards_fn"))


def _node(node: fx.Node) -> Node:
    target: Any = node.target
    if node.op == "placeholder":
        target = node.name
    elif isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            raise CaptureError(f"the traced potential mutates a tensor ({target}); functionalization left it")
        target = str(target)
    elif not callable(target) or isinstance(target, torch._ops.HigherOrderOperator):
        raise CaptureError(f"the traced potential holds an operation that cannot be replayed: {target}")
    return Node(
        name=node.name,
        op=node.op,
        target=target,
        args=_plain(node.args),
        kwargs={k: _plain(v) for k, v in node.kwargs.items()},
        spec=_spec(node.meta.get("val")),
    )


def _plain(tree: Any) -> Any:
    """Returns arguments as plain lists, tuples and dicts, with :class:`Ref` for nodes."""
    if isinstance(tree, fx.Node):
        return Ref(tree.name)
    if isinstance(tree, tuple):
        return tuple(_plain(x) for x in tree)
    if isinstance(tree, list):
        return [_plain(x) for x in tree]
    if isinstance(tree, dict):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(_plain(tree.start), _plain(tree.stop), _plain(tree.step))
    if isinstance(tree, torch.device):  # each rank's current one, not that of the rank that traced
        return torch.device(tree.type)
    return tree


def _spec(value: Any) -> TensorSpec | None:
    if not isinstance(value, Tensor):
        return None
    return TensorSpec(tuple(_size(s) for s in value.shape), value.dtype)


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else str(size.node.expr)
