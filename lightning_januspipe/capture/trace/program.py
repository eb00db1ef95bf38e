"""The traced potential as plain data: picklable, so that one rank traces and every rank holds the same graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lightning_januspipe.capture.trace.read_values import Fact
from lightning_januspipe.engine.autocast import OFF, Autocast
from lightning_januspipe.engine.specs import TensorSpec, evaluate
from lightning_januspipe.errors import CaptureError

GRADIENT_OP = "januspipe.energy_gradient.default"
_LARGEST_SIZE = 2**62

SLOT = torch.empty(0, device="meta")
"""Stands for a tensor in a tree; a tensor itself, so that what holds tensors is still seen to."""


@dataclass(frozen=True)
class ReturnedSize:
    """Stands for a number in what the forward returns that follows from the sizes of the batch.

    Attributes:
        expression: in size symbols.
        kind: int, float or bool.
    """

    expression: str
    kind: type

    def value(self, symbols: Mapping[str, int]) -> Any:
        """The number, from values of the size symbols."""
        return self.kind(evaluate(self.expression, symbols))


def returned_leaf(leaf: Any) -> Any:
    """A leaf of what the traced forward returned as plain data."""
    for kind, symbolic in ((int, torch.SymInt), (float, torch.SymFloat), (bool, torch.SymBool)):
        if isinstance(leaf, symbolic):
            return ReturnedSize(str(leaf.node.expr), kind)
    return leaf


@dataclass(frozen=True)
class Ref:
    """A use of another node's value, by that node's name."""

    name: str


@dataclass
class Node:
    """One operation: ``target`` is an ATen overload's name or a picklable Python function."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    spec: TensorSpec | None

    def inputs(self) -> list[str]:
        """Names of the nodes whose values this one uses, each once, in order."""
        found: dict[str, None] = {}
        _add_names(self.args, found)
        _add_names(self.kwargs, found)
        return list(found)


@dataclass
class Program:
    """A functional graph: placeholders (parameters, buffers, constants, inputs), operations, outputs.

    Attributes:
        nodes: in execution order, the placeholders first.
        parameters: placeholder name -> parameter name inside the potential.
        buffers: placeholder name -> buffer name inside the potential.
        constants: placeholder name -> tensor that the forward made by itself.
        inputs: placeholder names of the call's tensors, in order.
        energies: names of the differentiated values (each reduced to one number before differentiation).
        coordinates: names of the differentiation inputs (positions, strain, ...).
        gradient: name of the node that stands for the derivative.
        outputs: names of the forward's tensor outputs, in order (a node may stand several times).
        returned: the tree that the forward returns, with :data:`SLOT` for each of its tensors.
        sizes: names of the integers that the forward reads from tensors; the last inputs carry their values.
        facts: node names and the values that they have to have on every batch, with the line that read them.
        symbols: size symbol -> (input position, dimension) that defines it.
        limits: (input position, dimension) -> least and largest size that the program is right for.
        conditions: relations between sizes, in size symbols, that the program is right for.
        autocast: what the forward differentiates its energy under. Casts of the energy itself are operations.
    """

    nodes: list[Node]
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    inputs: list[str]
    energies: list[str]
    coordinates: list[str]
    gradient: str
    outputs: list[str]
    returned: Any
    sizes: list[str] = field(default_factory=list)
    facts: list[tuple[str, Fact]] = field(default_factory=list)
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)
    limits: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    autocast: Autocast = OFF

    def __post_init__(self) -> None:
        self.by_name = {n.name: n for n in self.nodes}

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Values of the size symbols for one call's tensors."""
        return {s: tensors[i].shape[d] for s, (i, d) in self.symbols.items()}

    @property
    def on_batch(self) -> list[str]:
        """Nodes that are evaluated for each batch, before the stages are: sizes and facts."""
        return [*self.sizes, *(name for name, _ in self.facts)]

    def dependent(self, roots: Collection[str]) -> set[str]:
        """These values, and all that are computed from them."""
        found = set(roots)
        for node in self.nodes:
            if node.op != "placeholder" and any(i in found for i in node.inputs()):
                found.add(node.name)
        return found


def _add_names(tree: Any, found: dict[str, None]) -> None:
    """The names of :func:`refs`, without generators: every graph is asked for them many times."""
    if isinstance(tree, Ref):
        found[tree.name] = None
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _add_names(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _add_names(item, found)
    elif isinstance(tree, slice):
        _add_names((tree.start, tree.stop, tree.step), found)


def refs(tree: Any) -> Iterable[Ref]:
    """Uses of other nodes inside arguments."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs(item)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))


def replace_refs(tree: Any, function: Callable[[str], Any]) -> Any:
    """Arguments with each :class:`Ref` replaced by ``function(name)``."""
    if isinstance(tree, Ref):
        return function(tree.name)
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace_refs(x, function) for x in tree)
    if isinstance(tree, dict):
        return {k: replace_refs(v, function) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(replace_refs(x, function) for x in (tree.start, tree.stop, tree.step)))
    return tree


def _copy(source: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten.copy`` has no derivative; this has."""
    return value.to(source.dtype).expand(source.shape)


def target_function(target: Any) -> Callable[..., Any]:
    """The callable behind a node's target."""
    if not isinstance(target, str):
        return target  # type: ignore[no-any-return]
    if target == "aten.copy.default":
        return _copy
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)  # type: ignore[no-any-return]


def program_from_export(
    exported: ExportedProgram,
    returned: Any,
    num_outputs: int,
    prefix: str,
    num_sizes: int = 0,
    facts: Sequence[Fact] = (),
) -> Program:
    """Plain data from an exported program whose graph has one :func:`energy_gradient` node.

    Args:
        exported: a functional program.
        returned: the tree that the traced forward returns, with :data:`SLOT` for its tensors.
        num_outputs: how many tensors that are; they are the program's first outputs.
        prefix: what stands before every parameter's and buffer's name in the exported program.
        num_sizes: how many integers the forward reads from tensors; these are its next outputs.
        facts: other values that it reads from tensors; these are its last outputs.

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
    nodes = [_node(n) for n in exported.graph.nodes if n.op in ("placeholder", "call_function")]
    nodes = [n for n in nodes if not _is_assertion(n)]
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
        sizes=user_outputs[num_outputs : num_outputs + num_sizes],
        facts=list(zip(user_outputs[num_outputs + num_sizes :], facts, strict=True)),
        symbols=symbols,
    )
    simplify(program)
    _refuse_trained_facts(program)
    program.limits = _limits(program, exported)
    program.conditions = _conditions(program, placeholders[inputs[0]].meta["val"]) if inputs else []
    return program


def merge_derivatives(nodes: Sequence[Node], marks: Sequence[Node]) -> list[Node]:
    """Several derivatives of one energy, such as forces and then a stress, as one with more coordinates.

    Args:
        nodes: in execution order.
        marks: the derivatives among them; the first takes in the others, and is changed.

    Raises:
        CaptureError: they are derivatives of different energies, or one is a derivative of another.
    """
    first, later = marks[0], {n.name for n in marks[1:]}
    same: dict[str, str] = {}  # the first node that computes the same as another one
    known: dict[str, str] = {}
    on_first = {first.name}
    for node in nodes:
        if on_first & set(node.inputs()):
            on_first.add(node.name)
        described = repr((node.target, _renamed(node.args, same), _renamed(node.kwargs, same)))
        is_pure = node.op != "placeholder" and not is_random(node.target)
        same[node.name] = known.setdefault(described, node.name) if is_pure else node.name
    starts = {first.name: 0}
    coordinates = list(first.args[1])
    for mark in marks[1:]:
        energies = [r.name for r in refs(mark.args[0])]
        if on_first & set(energies):
            raise CaptureError(
                "the potential differentiates a derivative again in its forward (a Hessian, or a gradient of forces), "
                "which is not possible in a pipeline: torch.autograd.grad of the energy only"
            )
        if [same[n] for n in energies] != [same[r.name] for r in refs(first.args[0])]:
            raise CaptureError(
                f"the potential differentiates {len(marks)} times, and not the same energy: ask for all derivatives in "
                "one call, e.g. torch.autograd.grad(energy.sum(), [positions, strain], create_graph=True)"
            )
        starts[mark.name] = len(coordinates)
        coordinates += mark.args[1]
    first.args = (first.args[0], coordinates)
    for node in nodes:
        if node.args and isinstance(node.args[0], Ref) and node.args[0].name in later:
            assert getattr(node.target, "__name__", "") == "getitem", "derivatives come in a list"
            node.args = (Ref(first.name), starts[node.args[0].name] + node.args[1])
    place = max(i for i, n in enumerate(nodes) if n.name in {r.name for r in coordinates})
    kept = [n for n in nodes if n.name not in later]
    after = next(i for i, n in enumerate(kept) if n is first)
    if place > after:
        raise CaptureError(
            "the potential differentiates its energy again with respect to a tensor that it makes after the first "
            "derivative: make it before, and ask for all derivatives in one torch.autograd.grad"
        )
    return kept


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    return replace_refs(tree, lambda name: Ref(names[name]))


def is_random(target: Any) -> bool:
    """Whether an operation draws random numbers."""
    tags = getattr(target_function(target), "tags", ()) if isinstance(target, str) else ()
    return torch.Tag.nondeterministic_seeded in tags


def _refuse_trained_facts(program: Program) -> None:
    changing = program.dependent({*program.parameters, program.gradient})
    for name, fact in program.facts:
        if name in changing:
            raise CaptureError(
                f"the forward reads the value {fact.value!r} from a tensor that depends on parameters or on the "
                f"derivative ({fact.place}), so that it changes in training. Use torch.where instead of a branch, or "
                "check such values outside of the forward."
            )


def _limits(program: Program, exported: ExportedProgram) -> dict[tuple[int, int], tuple[int, int]]:
    """Sizes for which the trace holds: a Python branch on a size, and a size made a constant, limit it.

    Ranges that exclude no more than 0 and 1 are left out: they come from operations that treat empty tensors apart, and
    from models that branch for a single structure only to squeeze a dimension.
    """
    used = {name for node in program.nodes if node.op != "placeholder" for name in node.inputs()}
    limits: dict[tuple[int, int], tuple[int, int]] = {}
    for position, name in enumerate(program.inputs):
        spec = program.by_name[name].spec
        for dim, size in enumerate(spec.shape if spec is not None and name in used else ()):
            if isinstance(size, int):
                limits[position, dim] = (size, size)
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in program.symbols:
            lower = int(bounds.lower) if bounds.lower > 2 else 0
            upper = int(bounds.upper) if bounds.upper < _LARGEST_SIZE else _LARGEST_SIZE
            if lower or upper < _LARGEST_SIZE:
                limits[program.symbols[str(symbol)]] = (lower, upper)
    return limits


def _conditions(program: Program, value: Any) -> list[str]:
    """What the trace took for granted of sizes beyond their limits: ``if num_edges > 2 * num_atoms``, say.

    Args:
        program: the program.
        value: what stood for one of its inputs in the trace.
    """
    shape_env = value.fake_mode.shape_env
    found = [shape_env.replace(guard.expr) for guard in shape_env.guards]
    known = set(program.symbols)
    return list(dict.fromkeys(str(e) for e in found if e.free_symbols and {str(s) for s in e.free_symbols} <= known))


def simplify(program: Program) -> Program:
    """The program without operations that return their input unchanged, and without those that nothing uses.

    Each such view costs a node of autograd in every one of the four phases. Dimensions are dropped by name: ``squeeze``
    would drop that of the structures too, where there is one.
    """
    same: dict[str, str] = {}

    def final(name: str) -> str:
        return same.get(name, name)

    kept = []
    for node in program.nodes:
        node.args = replace_refs(node.args, lambda n: Ref(final(n)))
        node.kwargs = replace_refs(node.kwargs, lambda n: Ref(final(n)))
        _fix_squeeze(program, node)
        if _returns_its_input(program, node):
            same[node.name] = node.args[0].name
        else:
            kept.append(node)
    program.nodes = kept
    program.outputs = [final(n) for n in program.outputs]
    program.sizes = [final(n) for n in program.sizes]
    program.facts = [(final(n), fact) for n, fact in program.facts]
    program.energies = [final(n) for n in program.energies]
    program.coordinates = [final(n) for n in program.coordinates]
    alive = {program.gradient, *program.outputs, *program.on_batch}
    for node in reversed(program.nodes):
        if node.name in alive:
            alive.update(node.inputs())
    program.nodes = [n for n in program.nodes if n.op == "placeholder" or n.name in alive]
    program.by_name = {n.name: n for n in program.nodes}
    return program


def _fix_squeeze(program: Program, node: Node) -> None:
    """Drop the dimensions that were dropped in the trace: those that always have one entry."""
    if node.target not in ("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"):
        return
    source = program.by_name[node.args[0].name].spec
    assert source is not None
    num = len(source.shape)
    given = node.args[1] if len(node.args) > 1 else range(num)
    dims = [d % num for d in ([given] if isinstance(given, int) else given)] if num else []
    node.target, node.args = "aten.squeeze.dims", (node.args[0], [d for d in dims if source.shape[d] == 1])


def _returns_its_input(program: Program, node: Node) -> bool:
    source = program.by_name[node.args[0].name] if node.args and isinstance(node.args[0], Ref) else None
    if source is None or source.spec is None or source.spec != node.spec:
        return False
    if node.target == "aten.slice.Tensor":
        start, stop, step = (*node.args[2:], None, None, None)[:3]
        full = stop is None or (isinstance(stop, int) and stop >= _LARGEST_SIZE)
        return start in (None, 0) and full and step in (None, 1)
    return node.target in ("aten.view.default", "aten._unsafe_view.default", "aten.alias.default", "aten.squeeze.dims")


def _is_assertion(node: Node) -> bool:
    """Run-time checks and metadata of export: the validation on other sizes replaces them."""
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
    """Arguments as plain lists, tuples and dicts with :class:`Ref` for nodes."""
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


def build_module(
    program: Program, nodes: Sequence[str], arguments: Sequence[str], outputs: Sequence[str], leaves: Iterable[str] = ()
) -> fx.GraphModule:
    """A module that computes ``outputs`` from ``arguments`` with just the operations among ``nodes``.

    Args:
        program: the whole graph.
        nodes: names of the operations that may be used (those that the outputs do not need are left out).
        arguments: names of the values given, in order.
        outputs: names of the values returned, in order.
        leaves: values after which a leaf of autograd is made, to differentiate with respect to it.
    """
    allowed, given = set(nodes), set(arguments)
    needed: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name in needed or name in given:
            continue
        assert name in allowed, f"{name} is needed, but not among the stage's operations"
        needed.add(name)
        stack.extend(program.by_name[name].inputs())
    graph, made, leaves = fx.Graph(), {}, set(leaves)

    def add(name: str, node: fx.Node) -> None:
        made[name] = graph.call_function(new_leaf, (node,)) if name in leaves else node

    for name in arguments:
        add(name, graph.placeholder(name))
    for source in program.nodes:
        if source.name in needed:
            args = replace_refs(source.args, made.__getitem__)
            kwargs = replace_refs(source.kwargs, made.__getitem__)
            add(source.name, graph.call_function(target_function(source.target), args, kwargs))
    graph.output(tuple(made[name] for name in outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def new_leaf(value: Tensor) -> Tensor:
    """A leaf of autograd with the same values."""
    return value.detach().requires_grad_(True)


class PlaceholderValues:
    """Values of placeholders: parameters and buffers of the live potential, constants, the call's tensors.

    Args:
        program: the traced potential.
        potential: the live potential; what it holds at the time of each call counts.
        names: the placeholders wanted, in order.
    """

    def __init__(self, program: Program, potential: nn.Module, names: Sequence[str]) -> None:
        self._sources: list[tuple[Any, Any]] = []
        positions = {n: i for i, n in enumerate(program.inputs)}
        device = next((p.device for p in potential.parameters()), torch.device("cpu"))
        for name in names:
            if name in positions:
                self._sources.append((None, positions[name]))
            elif name in program.constants:
                self._sources.append(({0: program.constants[name].to(device)}, 0))
            else:
                owned = program.parameters.get(name) or program.buffers[name]
                owner, _, attribute = owned.rpartition(".")
                module = potential.get_submodule(owner)
                self._sources.append((module._parameters if name in program.parameters else module._buffers, attribute))

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """The values, in the order of the names; of the call's tensors the values only."""
        given = [x.detach() if isinstance(x, Tensor) else x for x in tensors]
        return [given[key] if where is None else where[key] for where, key in self._sources]
