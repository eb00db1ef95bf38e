"""Turns random numbers that a forward draws into inputs of the captured program.

They are drawn once for each micro-batch, in the order of the forward, so that all stages, phases and ranks see the same
numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.trace.fixed_values_and_draws import Draw
from lightning_januspipe.capture.trace.operators import is_random
from lightning_januspipe.capture.trace.program import Node, Program, Ref, with_placeholders
from lightning_januspipe.errors import CaptureError


@torch.library.custom_op("januspipe::dropout_noise", mutates_args=())
def dropout_noise(x: Tensor, p: float) -> Tensor:
    """Stands in a trace for the factors of dropout: 0 with probability p, else 1 / (1 - p)."""
    raise NotImplementedError("dropout_noise marks a place in a traced graph and is never run")


@dropout_noise.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


class ShownDropout(TorchFunctionMode):
    """Replaces dropout by a product with random numbers while a forward is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            x, p, training, inplace = _dropout_arguments(*args, **kwargs)
            if training and p > 0:
                noise = torch.ops.januspipe.dropout_noise(x, p)
                return x.mul_(noise) if inplace else x * noise
        return func(*args, **kwargs)


def _dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training, inplace


# Operation -> kind, position of the first argument of the distribution, and number of these arguments.
_OPERATIONS = {
    "aten.rand.default": ("rand", 0, 0),
    "aten.rand_like.default": ("rand", 1, 0),
    "aten.randn.default": ("randn", 0, 0),
    "aten.randn_like.default": ("randn", 1, 0),
    "aten.randint.default": ("randint", 0, 1),
    "aten.randint.low": ("randint", 0, 2),
    "aten.randint_like.default": ("randint", 1, 1),
    "aten.randint_like.low_dtype": ("randint", 1, 2),
    "aten.randperm.default": ("randperm", 0, 0),
    "aten.uniform.default": ("uniform", 1, 2),
    "aten.normal_functional.default": ("normal", 1, 2),
    "aten.exponential.default": ("exponential", 1, 1),
    "aten.bernoulli.p": ("bernoulli", 1, 1),
    "januspipe.dropout_noise.default": ("dropout", 1, 1),
}


def draw_outside(program: Program) -> Program:
    """``Program -> Program``: makes inputs of the random numbers.

    Args:
        program: the captured program; it is changed.

    Returns:
        The program, with a :class:`~.fixed_values_and_draws.Draw` for each new input.

    Raises:
        CaptureError: the distribution of random numbers depends on values of tensors.
    """
    nodes: list[Node] = []
    drawn: list[Node] = []
    for node in program.nodes:
        draw = None if node.is_placeholder else _draw_of(node)
        if draw is not None:
            drawn.append(Node(node.name, "placeholder", node.name, (), {}, node.spec))
            program.draws.append(draw)
            program.inputs.append(node.name)
            continue
        if is_random(node) and not _is_disabled_dropout(node):
            raise CaptureError(
                f"the potential draws random numbers in its forward ({node.target}) that cannot be drawn before its "
                "stages run. Use torch.rand, torch.randn, torch.randint or torch.nn.functional.dropout, or draw the "
                "numbers in the dataset."
            )
        nodes.append(node)
    program.replace_nodes(with_placeholders(nodes, drawn))
    return program


def _draw_of(node: Node) -> Draw | None:
    known = _OPERATIONS.get(node.target) if isinstance(node.target, str) else None
    if known is None or node.spec is None:
        return None
    kind, start, num = known
    arguments = tuple(node.args[start : start + num])
    if kind == "randint" and num == 1:
        arguments = (0, *arguments)
    if any(isinstance(a, Ref) for a in arguments):
        return None
    return Draw(kind, node.spec, arguments)


def _is_disabled_dropout(node: Node) -> bool:
    off = len(node.args) >= 2 and node.args[1] in (0, 0.0)
    return "dropout" in str(node.target) and (off or (len(node.args) >= 3 and node.args[2] is False))
