"""Holds a captured program as plain data, so that one rank traces and all ranks get the same graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.capture.trace.fixed_values_and_draws import Draw, FixedValue
from lightning_januspipe.engine.autocast import OFF, Autocast
from lightning_januspipe.engine.specs import TensorSpec, evaluate

GRADIENT_OP = "januspipe.energy_gradient.default"
LARGEST_SIZE = 2**62
"""Stands for no upper limit of a size, and for the end of a dimension in slices."""

SLOT = torch.empty(0, device="meta")
"""Stands for a tensor in a tree; being a tensor, it shows that the containers around it hold tensors."""


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
        """Returns the number for given values of the size symbols."""
        return self.kind(evaluate(self.expression, symbols))


def returned_leaf(leaf: Any) -> Any:
    """Returns a leaf of what the traced forward returned, as plain data."""
    for kind, symbolic in ((int, torch.SymInt), (float, torch.SymFloat), (bool, torch.SymBool)):
        if isinstance(leaf, symbolic):
            return ReturnedSize(str(leaf.node.expr), kind)
    return leaf


@dataclass(frozen=True)
class Ref:
    """Refers to another node's value by that node's name."""

    name: str


@dataclass
class Node:
    """Describes one operation, or a placeholder for a value that is given.

    Attributes:
        name: unique in the program.
        op: ``"placeholder"`` or ``"call_function"``.
        target: an ATen overload's name, or a picklable Python function.
        args: positional arguments, with a :class:`Ref` for each value of another node.
        kwargs: keyword arguments, likewise.
        spec: shape and dtype of its value; None if that is no tensor.
    """

    name: str
    op: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    spec: TensorSpec | None

    @property
    def is_placeholder(self) -> bool:
        """Tells whether its value is given instead of computed."""
        return self.op == "placeholder"

    def inputs(self) -> list[str]:
        """Returns the names of the nodes whose values this one uses, each once, in order."""
        return list(dict.fromkeys(r.name for r in refs((self.args, self.kwargs))))

    def rename(self, names: Callable[[str], str]) -> None:
        """Replaces the names of the nodes whose values this one uses."""
        self.args = replace_refs(self.args, lambda n: Ref(names(n)))
        self.kwargs = replace_refs(self.kwargs, lambda n: Ref(names(n)))


@dataclass
class Program:
    """Holds a graph without mutations: placeholders (parameters, buffers, constants, inputs), operations, outputs.

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
        fixed_values: names of the other values that the forward reads, each with the value that it always has to have.
        draws: random numbers that the forward draws; they are inputs after the sizes.
        prepared: names of operations whose results are inputs, after the random numbers.
        symbols: size symbol -> (input position, dimension) that defines it.
        limits: (input position, dimension) -> least and largest size that the program is right for.
        guards: relations between sizes, in size symbols, that the program is right for.
        equal_sizes: pairs of size symbols that the trace assumed to be equal; one is a length that depends on values.
        autocast: the autocast under which the energy is differentiated. Casts of the energy itself are operations.
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
    fixed_values: list[tuple[str, FixedValue]] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    symbols: dict[str, tuple[int, int]] = field(default_factory=dict)
    limits: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    equal_sizes: list[tuple[str, str]] = field(default_factory=list)
    autocast: Autocast = OFF

    def __post_init__(self) -> None:
        self.by_name = {n.name: n for n in self.nodes}

    @property
    def operations(self) -> list[Node]:
        """Returns the nodes that are computed, in execution order."""
        return [n for n in self.nodes if not n.is_placeholder]

    @property
    def results(self) -> set[str]:
        """Returns the names of the outputs, energies, coordinates, and values that are computed for each batch."""
        return {*self.outputs, *self.of_batch, *self.energies, *self.coordinates}

    @property
    def of_batch(self) -> list[str]:
        """Returns the names of sizes, index lists and fixed values, which each batch has before the stages run."""
        return [*self.sizes, *self.prepared, *(name for name, _ in self.fixed_values)]

    @property
    def first_draw(self) -> int:
        """Returns the position of the first input that is drawn or computed, and not taken from the call."""
        return len(self.inputs) - len(self.draws) - len(self.prepared)

    def spec(self, name: str) -> TensorSpec:
        """Returns the shape and dtype of a value that has to be a tensor."""
        spec = self.by_name[name].spec
        assert spec is not None, f"{name} is no tensor"
        return spec

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the values of the size symbols for one call's tensors."""
        return {s: tensors[i].shape[d] for s, (i, d) in self.symbols.items()}

    def replace_nodes(self, nodes: list[Node]) -> None:
        """Takes other nodes."""
        self.nodes = nodes
        self.by_name = {n.name: n for n in nodes}


def with_placeholders(nodes: Sequence[Node], added: Sequence[Node]) -> list[Node]:
    """Returns nodes with more placeholders, after the ones that they begin with."""
    first = next((i for i, n in enumerate(nodes) if not n.is_placeholder), len(nodes))
    return [*nodes[:first], *added, *nodes[first:]]


def symbols_in(size: int | str) -> set[str]:
    """Returns the size symbols in an expression; functions of sympy begin with capitals."""
    return set(re.findall(r"\b[a-z]\w*", size)) if isinstance(size, str) else set()


def refs(tree: Any) -> list[Ref]:
    """Returns every use of another node inside arguments, in order."""
    found: list[Ref] = []
    _add_refs(tree, found)
    return found


def _add_refs(tree: Any, found: list[Ref]) -> None:
    if isinstance(tree, Ref):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            _add_refs(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _add_refs(item, found)
    elif isinstance(tree, slice):
        _add_refs((tree.start, tree.stop, tree.step), found)


def replace_refs(tree: Any, function: Callable[[str], Any]) -> Any:
    """Returns arguments with each :class:`Ref` replaced by ``function(name)``."""
    if isinstance(tree, Ref):
        return function(tree.name)
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace_refs(x, function) for x in tree)
    if isinstance(tree, dict):
        return {k: replace_refs(v, function) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(replace_refs(x, function) for x in (tree.start, tree.stop, tree.step)))
    return tree
