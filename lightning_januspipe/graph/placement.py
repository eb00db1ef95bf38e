"""Defines the placements of a captured program's values on the graph ranks, named as DTensor names them.

====================  ==============================================  ========================================
kind                  value                                           cotangent
====================  ==============================================  ========================================
``SHARD``             each rank holds its own rows                    each rank holds that of its own rows
``REPLICATE``         all ranks hold the same (energies, strain)      all ranks hold the same, whole cotangent
``PARTIAL_GRADIENT``  all ranks hold the same (parameters)            partial: the ranks' cotangents are summed
====================  ==============================================  ========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from lightning_januspipe.capture.trace.program import Node
from lightning_januspipe.errors import CaptureError


class PlacementKind(Enum):
    """Tells how the graph ranks hold a value and its cotangent; see the table above."""

    SHARD = auto()
    REPLICATE = auto()
    PARTIAL_GRADIENT = auto()


@dataclass(frozen=True)
class Placement:
    """Tells how the graph ranks hold a value.

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
        """Tells whether each rank holds its own rows."""
        return self.kind is PlacementKind.SHARD


PARTIAL_GRADIENT, REPLICATE = Placement(PlacementKind.PARTIAL_GRADIENT), Placement(PlacementKind.REPLICATE)


class NoExchangeError(CaptureError):
    """An operation combines rows in a way for which there is no exchange.

    Attributes:
        operation: its name.
    """

    operation = ""


def no_exchange(node: Node, what: str) -> NoExchangeError:
    """Returns the error for an operation that has no exchange.

    Args:
        node: the operation.
        what: what it does, as a part of the sentence.
    """
    error = NoExchangeError(
        f"graph_size > 1 is not possible: operation {node.target} ({node.name}) of the potential {what}, for which "
        "there is no exchange between graph ranks. Use graph_size=1."
    )
    error.operation = node.name
    return error
