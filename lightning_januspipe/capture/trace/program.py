"""The traced potential as plain data: picklable, so that one rank traces and every rank holds the same graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_januspipe.capture.trace import segment_linear
from lightning_januspipe.capture.trace.read_values import Fact
from lightning_januspipe.engine.autocast import OFF, Autocast
from lightning_januspipe.engine.specs import TensorSpec, evaluate

# Programs name operations; these have to be registered on every rank that runs one.
_OWN_OPERATIONS = (segment_linear.segment_linear,)

GRADIENT_OP = "januspipe.energy_gradient.default"
LARGEST_SIZE = 2**62

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
        draws: random numbers (:class:`~.random_draws.Draw`) that are inputs, after those of the sizes.
        prepared: names of operations whose results are inputs, after those.
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
    draws: list[Any] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
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
    def first_draw(self) -> int:
        """Position of the first input that the forward itself draws or makes."""
        return len(self.inputs) - len(self.draws) - len(self.prepared)

    @property
    def on_batch(self) -> list[str]:
        """Nodes that are evaluated for each batch, before the stages are: sizes, lists of indices, facts."""
        return [*self.sizes, *self.prepared, *(name for name, _ in self.facts)]

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


def is_random(target: Any) -> bool:
    """Whether an operation draws random numbers."""
    tags = getattr(target_function(target), "tags", ()) if isinstance(target, str) else ()
    return torch.Tag.nondeterministic_seeded in tags


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
        full = stop is None or (isinstance(stop, int) and stop >= LARGEST_SIZE)
        return start in (None, 0) and full and step in (None, 1)
    return node.target in ("aten.view.default", "aten._unsafe_view.default", "aten.alias.default", "aten.squeeze.dims")


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


def placeholders_of(
    program: Program, nodes: Sequence[str], outputs: Sequence[str], given: Sequence[str] = ()
) -> list[str]:
    """Placeholders that the outputs need, in the program's order."""
    allowed, stop = set(nodes), set(given)
    found: set[str] = set()
    seen: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name in seen or name in stop:
            continue
        seen.add(name)
        node = program.by_name[name]
        if node.op == "placeholder":
            found.add(name)
        elif name in allowed:
            stack.extend(node.inputs())
    return [n.name for n in program.nodes if n.name in found]
