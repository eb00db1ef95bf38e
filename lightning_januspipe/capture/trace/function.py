"""Turns parts of a captured program into functions of a call's tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_januspipe.capture.trace.graph_walks import ancestors, placeholders
from lightning_januspipe.capture.trace.operators import target_function
from lightning_januspipe.capture.trace.program import Program, replace_refs
from lightning_januspipe.engine.autocast import OFF, autocast_as


class ProgramFunction:
    """Computes some values of a program from a call's tensors, in the caller's grad mode and outside autocast.

    Casts are operations of the program. The potential's parameters and buffers at the time of each call count.

    Args:
        program: the captured program.
        potential: the live potential.
        operations: names of the operations that may be used; those that the outputs do not need are left out.
        outputs: names of the values computed, in order.
        given: names of the values given at each call, in order.
        leaves: values after which a leaf of autograd is made, to differentiate with respect to it.

    Attributes:
        names: placeholders that it reads, in the order of :meth:`values`.
        parameters: the trainable parameters that it reads.
        graph: the operations that it runs.
    """

    def __init__(
        self,
        program: Program,
        potential: nn.Module,
        operations: Collection[str],
        outputs: Sequence[str],
        given: Sequence[str] = (),
        leaves: Collection[str] = (),
    ) -> None:
        self.names = names = placeholders(program, ancestors(program, outputs, given))
        self._placeholders = PlaceholderValues(program, potential, names)
        self._module = build_module(program, operations, [*names, *given], outputs, leaves)
        self.graph = self._module.graph
        live = dict(potential.named_parameters(remove_duplicate=False))
        read = dict.fromkeys(live[program.parameters[n]] for n in names if n in program.parameters)
        self.parameters: Sequence[nn.Parameter] = [p for p in read if p.requires_grad]

    def __call__(self, tensors: Sequence[Any], given: Sequence[Any] = ()) -> list[Tensor]:
        """Returns the outputs.

        Args:
            tensors: the call's tensors.
            given: the values given.
        """
        with autocast_as(OFF):
            return list(self._module(*self.values(tensors), *given))

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns the values of all placeholders that it reads, by the call's tensors."""
        return self._placeholders.values(tensors)


def build_module(
    program: Program,
    operations: Collection[str],
    arguments: Sequence[str],
    outputs: Sequence[str],
    leaves: Collection[str] = (),
) -> fx.GraphModule:
    """Returns a module that computes ``outputs`` from ``arguments``; see :class:`ProgramFunction`."""
    needed = ancestors(program, outputs, given=set(arguments))
    for name in sorted(needed.difference(operations)):
        raise AssertionError(f"{name} is needed, but not among the operations that may be used")
    graph, made = fx.Graph(), {}

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
    return fx.GraphModule(nn.Module(), graph)


def new_leaf(value: Tensor) -> Tensor:
    """Returns a leaf of autograd with the same values."""
    return value.detach().requires_grad_(True)


class PlaceholderValues:
    """Reads values of placeholders: parameters and buffers of the live potential, constants, the call's tensors.

    Args:
        program: the traced potential.
        potential: the live potential; its parameters and buffers at the time of each call count.
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
        """Returns the values in the order of the names, the call's tensors without their graphs."""
        given = [x.detach() if isinstance(x, Tensor) else x for x in tensors]
        return [given[key] if where is None else where[key] for where, key in self._sources]
