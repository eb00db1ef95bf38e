"""The operations of one captured stage as plain data: a pure function without the live potential."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from lightning_januspipe.capture.trace.program import Node, Program, build_module
from lightning_januspipe.engine.specs import StageOutput


@dataclass
class StageBody:
    """A captured stage as a function of the values that it reads and of its boundary; it can be sent to processes.

    Attributes:
        program: the operations of the stage and their inputs, and no others.
        values: names of the values that it reads: parameters, buffers, constants and tensors of the batch.
        boundary: names of the values that it receives.
        outputs: names of what it returns: boundary, energies, observables and coordinates.
        counts: how many of the outputs are boundary, energies and observables.
        leaves: names of the coordinates that become leaves of autograd.
    """

    program: Program
    values: list[str]
    boundary: list[str]
    outputs: list[str]
    counts: tuple[int, int, int]
    leaves: list[str]
    _module: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    def __call__(self, values: Sequence[Any], received: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage; see :class:`~lightning_januspipe.engine.specs.StageFunction`."""
        if self._module is None:
            names = [n.name for n in self.program.nodes]
            arguments = [*self.values, *self.boundary]
            self._module = build_module(self.program, names, arguments, self.outputs, self.leaves)
        out = iter(self._module(*values, *received))
        boundary, energies, observables = ([next(out) for _ in range(count)] for count in self.counts)
        return StageOutput(boundary, energies, observables, list(out))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the module, which is built anew."""
        return {**self.__dict__, "_module": None}

    def text(self) -> str:
        """Returns all that the stage computes as text, the same in every process."""
        nodes = [f"{n.name} {n.op} {_target(n)} {n.args!r} {n.kwargs!r} {n.spec!r}" for n in self.program.nodes]
        return "\n".join([*nodes, repr((self.values, self.boundary, self.outputs, self.counts, self.leaves))])


def stage_body(
    program: Program,
    nodes: Sequence[str],
    values: Sequence[str],
    boundary: Sequence[str],
    outputs: Sequence[str],
    counts: tuple[int, int, int],
    leaves: Sequence[str],
) -> StageBody:
    """Returns the stage that computes some values of a program.

    Args:
        program: the traced potential.
        nodes: names of the operations that may be used.
        values: names of the inputs of the program that they need.
        boundary: names of the values received.
        outputs: names of what is returned.
        counts: how many of the outputs are boundary, energies and observables.
        leaves: names of the values that become leaves of autograd.
    """
    given = {*values, *boundary}
    allowed = set(nodes)
    needed: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name in needed:
            continue
        needed.add(name)
        if name not in given:
            assert name in allowed, f"{name} is needed, but not among the stage's operations"
            stack.extend(program.by_name[name].inputs())
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
    return StageBody(own, list(values), list(boundary), list(outputs), counts, [n for n in leaves if n in needed])


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return f"{node.target.__module__}.{node.target.__qualname__}"
