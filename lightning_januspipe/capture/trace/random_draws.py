"""Random numbers that a forward draws are inputs of the traced program.

They are drawn once for each micro-batch, in the order of the forward, so that all stages, phases and ranks see the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.trace.program import Node, Program, Ref, is_random
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError, shown


@torch.library.custom_op("januspipe::dropout_noise", mutates_args=())
def dropout_noise(x: Tensor, p: float) -> Tensor:
    """Stands in a trace for what dropout multiplies ``x`` by: 0 with probability p, else 1 / (1 - p)."""
    raise NotImplementedError("dropout_noise marks a place in a traced graph and is never run")


@dropout_noise.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


class ShownDropout(TorchFunctionMode):
    """Makes of dropout a product with random numbers, while a forward is traced."""

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


@dataclass(frozen=True)
class Draw:
    """Random numbers of one operation.

    Attributes:
        kind: one of :data:`_KINDS`.
        spec: shape and type.
        arguments: limits, mean, probability, ..., as its kind has them.
    """

    kind: str
    spec: TensorSpec
    arguments: tuple[float, ...] = ()

    def __call__(self, symbols: Mapping[str, int], device: torch.device, training: bool) -> Tensor:
        """Draws from the global generator.

        Args:
            symbols: values of the size symbols.
            device: of the numbers.
            training: whether dropout is on.
        """
        shape, dtype = self.spec.sizes(symbols), self.spec.dtype
        if self.kind == "dropout" and not training:
            return torch.ones(shape, dtype=dtype, device=device)
        return _KINDS[self.kind](shape, dtype, device, *self.arguments)


Shape = tuple[int, ...]


def _filled(method: str) -> Callable[..., Tensor]:
    def draw(shape: Shape, dtype: torch.dtype, device: torch.device, *arguments: float) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        drawn: Tensor = getattr(empty, method)(*arguments)
        return drawn

    return draw


def _dropout(shape: Shape, dtype: torch.dtype, device: torch.device, p: float) -> Tensor:
    return functional.dropout(torch.ones(shape, dtype=dtype, device=device), p, True)


_KINDS: dict[str, Callable[..., Tensor]] = {
    "rand": lambda shape, dtype, device: torch.rand(shape, dtype=dtype, device=device),
    "randn": lambda shape, dtype, device: torch.randn(shape, dtype=dtype, device=device),
    "randint": lambda shape, dtype, device, low, high: torch.randint(low, high, shape, dtype=dtype, device=device),
    "randperm": lambda shape, dtype, device: torch.randperm(shape[0], dtype=dtype, device=device),
    "uniform": _filled("uniform_"),
    "normal": _filled("normal_"),
    "exponential": _filled("exponential_"),
    "bernoulli": _filled("bernoulli_"),
    "dropout": _dropout,
}

# Operation -> kind, and how many arguments before those of the kind.
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


def draw_outside(program: Program, path: str) -> None:
    """Make inputs of the random numbers that a program draws.

    Args:
        program: a traced potential, which is changed.
        path: its name, for the message.

    Raises:
        CaptureError: it draws numbers whose distribution depends on values.
    """
    nodes: list[Node] = []
    drawn: list[Node] = []
    for node in program.nodes:
        draw = _draw_of(node)
        if draw is not None:
            drawn.append(Node(node.name, "placeholder", node.name, (), {}, node.spec))
            program.draws.append(draw)
            program.inputs.append(node.name)
            continue
        if node.op != "placeholder" and is_random(node.target) and not _is_disabled_dropout(node):
            raise CaptureError(
                f"the potential {shown(path)} draws random numbers in its forward ({node.target}) in a way that can "
                "not be done before its stages run. torch.rand, torch.randn, torch.randint and torch.nn.functional."
                "dropout can; or draw the numbers in the dataset."
            )
        nodes.append(node)
    first = next((i for i, n in enumerate(nodes) if n.op != "placeholder"), len(nodes))
    program.nodes = [*nodes[:first], *drawn, *nodes[first:]]
    program.by_name = {n.name: n for n in program.nodes}


def _draw_of(node: Node) -> Draw | None:
    known = _OPERATIONS.get(node.target) if isinstance(node.target, str) and node.op != "placeholder" else None
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
