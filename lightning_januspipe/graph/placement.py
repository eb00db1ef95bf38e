"""What the values of a captured program are to the graph ranks, and what its operations do with rows.

====================  ==============================================  ========================================
kind                  value                                           cotangent
====================  ==============================================  ========================================
``SHARD``             each rank holds its own rows                    each rank holds that of its own rows
``REPLICATE``         all ranks hold the same (energies, strain)      all ranks hold the same, whole cotangent
``PARTIAL_GRADIENT``  all ranks hold the same (parameters)            partial: the ranks' cotangents are summed
====================  ==============================================  ========================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from lightning_januspipe.capture.trace.program import Node, Program
from lightning_januspipe.errors import CaptureError

CONSTANT = re.compile(r"aten\.(new_)?(zeros|ones|full|empty)(_like)?\.|aten\.scalar_tensor\.")
REPEATING = re.compile(r"aten\.(expand|expand_as|repeat)\.")
_ZEROS = re.compile(r"aten\.(new_)?zeros(_like)?\.")
CONTRACTING = {
    *("aten.sum.default", "aten.sum.dim_IntList", "aten.mm.default", "aten.bmm.default", "aten.matmul.default"),
    *("aten.dot.default", "aten.einsum.default", "aten.mv.default", "aten.tensordot.default"),
}
"""Operations that sum over rows, and do nothing else with them."""
_MIXING = {
    *("aten.cumsum.default", "aten.flip.default", "aten.roll.default", "aten.sort.default", "aten.argsort.default"),
    *("aten._softmax.default", "aten.softmax.int", "aten._log_softmax.default", "aten.cumprod.default"),
    *("aten.topk.default", "aten.sort.stable", "aten.argsort.stable", "aten.log_softmax.int"),
}
"""Operations along some dimensions that keep their sizes."""
_ADDING = {"aten.index_add.default", "aten.scatter_add.default"}


class PlacementKind(Enum):
    """What a value is to the graph ranks."""

    SHARD = auto()
    REPLICATE = auto()
    PARTIAL_GRADIENT = auto()


@dataclass(frozen=True)
class Placement:
    """What a value is to the graph ranks.

    Attributes:
        kind: see :mod:`~lightning_januspipe.graph.placement`.
        rows: the class of rows of a sharded value.
        dim: the dimension of these rows.
        times: how many entries along ``dim`` each row takes.
    """

    kind: PlacementKind
    rows: str = ""
    dim: int = 0
    times: int = 1

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds its own rows."""
        return self.kind is PlacementKind.SHARD


PARTIAL_GRADIENT, REPLICATE = Placement(PlacementKind.PARTIAL_GRADIENT), Placement(PlacementKind.REPLICATE)


def is_zero(program: Program, name: str) -> bool:
    """Whether a value holds zeros only, by the operation that makes it."""
    node = program.by_name[name]
    target = str(node.target)
    if target.startswith(("aten.expand.", "aten.view.", "aten.clone.")):
        return is_zero(program, node.args[0].name)
    if target.startswith(("aten.full.", "aten.new_full.", "aten.full_like.")):
        return bool(node.args[2 if "new_full" in target else 1] == 0)
    return _ZEROS.match(target) is not None


def is_size(node: Node) -> bool:
    """Whether an operation gives a size, or computes with sizes, and no tensor."""
    if node.op == "placeholder" or node.spec is not None:
        return False
    target = str(node.target)
    return target.startswith("aten.sym_") or (
        not target.startswith("aten.") and getattr(node.target, "__name__", "") != "getitem"
    )


def mixes(node: Node, value: Placement) -> bool:
    """Whether an operation along some dimensions combines the rows of what it reads."""
    if node.target not in _MIXING:
        return False
    place = 2 if node.target == "aten.roll.default" else 1
    dims = node.args[place] if len(node.args) > place else None
    num = len(node.spec.shape) if node.spec is not None else 1
    dims = [dims] if isinstance(dims, int) else dims
    return not isinstance(dims, (list, tuple)) or value.dim in [d % num for d in dims]


def adds(node: Node) -> bool:
    """Whether an index operation sums into what it writes."""
    if node.target == "aten.index_put.default":
        return len(node.args) > 3 and bool(node.args[3])
    if node.target == "aten.scatter_reduce.two":
        return node.args[4] == "sum"
    return node.target in _ADDING


def is_largest(node: Node) -> bool:
    """Whether an index operation keeps the largest of floating-point values."""
    is_float = node.spec is not None and node.spec.dtype.is_floating_point
    return node.target == "aten.scatter_reduce.two" and node.args[4] == "amax" and is_float


def refused(node: Node, what: str) -> CaptureError:
    """The error for an operation that has no exchange.

    Args:
        node: the operation.
        what: it does, as a part of the sentence.
    """
    return CaptureError(
        f"graph_size > 1 is not possible: operation {node.target} ({node.name}) of the potential {what}, for which "
        "there is no exchange between graph ranks. Use graph_size=1."
    )
