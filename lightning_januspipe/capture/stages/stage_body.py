"""Turns the operations of one captured stage into plain data: a pure function without the live potential."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from lightning_januspipe.capture.trace.function import build_module
from lightning_januspipe.capture.trace.graph_walks import ancestors
from lightning_januspipe.capture.trace.program import Node, Program, Ref, replace_refs
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.specs import StageOutput

_VIEW = "aten.view.default"


@dataclass
class StageBody:
    """Computes a captured stage from its boundary and the values that it reads; it can be sent to other processes.

    Attributes:
        program: the operations of the stage and their inputs, and no others.
        values: names of the values that it reads: parameters, buffers, constants and tensors of the batch.
        received: names of the values of its boundary.
        outputs: names of what it returns: boundary, energies, observables and coordinates.
        counts: how many of the outputs are boundary, energies and observables.
        leaves: names of the coordinates that become leaves of autograd.
        conditions: relations between the potential's size symbols for which the operations are right.
    """

    program: Program
    values: list[str]
    received: list[str]
    outputs: list[str]
    counts: tuple[int, int, int]
    leaves: list[str]
    conditions: tuple[str, ...] = ()
    _module: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    def __call__(self, values: Sequence[Any], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage; see :class:`~lightning_januspipe.engine.specs.StageFunction`."""
        if self._module is None:
            operations = [n.name for n in self.program.operations]
            arguments = [*self.values, *self.received]
            self._module = build_module(self.program, operations, arguments, self.outputs, self.leaves)
        with autocast_as(OFF):
            out = iter(self._module(*values, *boundary))
        sent, energies, observables = ([next(out) for _ in range(count)] for count in self.counts)
        return StageOutput(sent, energies, observables, list(out))

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything but the module, which is built anew."""
        return {**self.__dict__, "_module": None}

    def with_copies(self) -> StageBody:
        """Returns the same stage with copies where a view is not possible.

        A forward may take a view that only the order of entries in memory allows, such as that of ``torch.nonzero``.
        """
        nodes = [replace(n, target="aten.reshape.default") if n.target == _VIEW else n for n in self.program.nodes]
        return replace(self, program=replace(self.program, nodes=nodes), _module=None)

    def text(self) -> str:
        """Returns all that the stage computes as text, the same in every process and for stages of equal layers."""
        numbers = {node.name: index for index, node in enumerate(self.program.nodes)}
        given, lines = {*self.values, *self.received}, []
        for node in self.program.nodes:
            operation = "given" if node.name in given else f"{_target(node)} {_numbered(node, numbers)!r}"
            lines.append(f"{operation} {node.spec!r}")
        ends = [[numbers[name] for name in names] for names in (self.values, self.received, self.outputs, self.leaves)]
        return "\n".join([*lines, repr((ends, self.counts)), *self.conditions])


def stage_body(
    program: Program,
    values: Sequence[str],
    received: Sequence[str],
    outputs: Sequence[str],
    counts: tuple[int, int, int],
    leaves: Collection[str],
) -> StageBody:
    """Returns the stage that computes some values of a program.

    Args:
        program: the captured program.
        values: names of the placeholders that it reads.
        received: names of the values of its boundary.
        outputs: names of what is returned.
        counts: how many of the outputs are boundary, energies and observables.
        leaves: names of the values that become leaves of autograd.
    """
    needed = ancestors(program, outputs, given=set(received)) | {*received, *values}
    own = Program(
        nodes=[n for n in program.nodes if n.name in needed],
        parameters={},
        buffers={},
        constants={},
        inputs=[],
        energies=[],
        coordinates=[],
        gradient="",
        outputs=[],
        returned=None,
    )
    leaves = [n.name for n in own.nodes if n.name in leaves and n.name not in received]
    return StageBody(own, list(values), list(received), list(outputs), counts, leaves)


def _numbered(node: Node, numbers: Mapping[str, int]) -> Any:
    """Returns the arguments of an operation with numbers in the place of names."""
    return replace_refs((node.args, node.kwargs), lambda name: Ref(str(numbers[name])))


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return f"{node.target.__module__}.{node.target.__qualname__}"
