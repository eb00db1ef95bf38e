"""Makes exchanges operators of torch: each is one node of a traced graph, whatever messages it sends.

A traced graph is right for any micro-batch, so an operator takes the handle of an exchange, and looks the exchange up
when it runs. How an exchange is differentiated is written down once, in :mod:`~lightning_januspipe.graph.collectives`:
autograd goes through these functions while a stage is traced, and the derivative of an operator is the transposed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_januspipe.graph.exchange import Exchange, exchange_of

NAMESPACE = "januspipe"
"""Namespace of the operators. Compiled stages know exchanges by it."""


@dataclass(frozen=True)
class _Operator:
    """Describes an operator ``(x, handle, num_halo, after) -> y``.

    Attributes:
        run: the method of an exchange that it calls.
        added_halos: how many more halos of rows the result has.
    """

    run: Callable[[Exchange, Tensor], Tensor]
    added_halos: int


_OPERATORS = {
    "gather_halo": _Operator(Exchange.gathered, 1),
    "gather_halo_exactly": _Operator(lambda exchange, x: exchange.gathered(x, is_exact=True), 1),
    "sum_halo": _Operator(Exchange.summed, -1),
    "largest_in_halo": _Operator(Exchange.largest, -1),
    "sum_over_ranks": _Operator(Exchange.total, 0),
    # An operator too: the ranks would trace different graphs.
    "on_first_rank": _Operator(lambda exchange, x: exchange.on_first_rank(x).clone(), 0),
}


class TracedExchange(Exchange):
    """Stands for the exchanges of all micro-batches while a stage is traced.

    Args:
        handle: the input of the graph with the handle of an exchange.
        num_halo: the input of the graph with its number of halo rows.
    """

    def __init__(self, handle: int, num_halo: int) -> None:
        self._handle, self._num_halo = handle, num_halo

    @property
    def is_free(self) -> bool:
        """Returns False: the operators find out when they run."""
        return False

    @property
    def is_alone(self) -> bool:
        """Returns False, likewise."""
        return False

    @property
    def num_halo(self) -> int:
        """Returns the symbolic number of rows of other ranks."""
        return self._num_halo

    def check_own(self, x: Tensor) -> None:
        """Does nothing: the sizes of a micro-batch are compared before its graphs run."""

    def check_held(self, x: Tensor) -> None:
        """Does nothing, likewise."""

    def gathered(self, x: Tensor, is_exact: bool = False) -> Tensor:
        """Returns what :meth:`.Exchange.gathered` returns, as one operation."""
        return self._operation("gather_halo_exactly" if is_exact else "gather_halo", x)

    def summed(self, y: Tensor) -> Tensor:
        """Returns what :meth:`.Exchange.summed` returns, as one operation."""
        return self._operation("sum_halo", y)

    def largest(self, y: Tensor) -> Tensor:
        """Returns what :meth:`.Exchange.largest` returns, as one operation."""
        return self._operation("largest_in_halo", y)

    def total(self, x: Tensor) -> Tensor:
        """Returns what :meth:`.Exchange.total` returns, as one operation."""
        return self._operation("sum_over_ranks", x)

    def on_first_rank(self, x: Tensor) -> Tensor:
        """Returns what :meth:`.Exchange.on_first_rank` returns, as one operation."""
        return self._operation("on_first_rank", x)

    def _operation(self, name: str, x: Tensor) -> Tensor:
        found: Tensor = getattr(getattr(torch.ops, NAMESPACE), name)(x, self._handle, self._num_halo)
        return found


def _register(name: str, operator: _Operator) -> None:
    """Registers an operator ``(x, handle, num_halo, after) -> y``, with the shape of its result.

    ``after`` is the result of the exchange before it, which it only waits for.
    """

    def run(x: Tensor, handle: int, num_halo: int, after: Tensor | None = None) -> Tensor:
        exchange: Exchange = exchange_of(handle)
        assert exchange.num_halo == num_halo, "the graph has the sizes of another micro-batch"
        return operator.run(exchange, x).contiguous()

    def fake(x: Tensor, handle: int, num_halo: int, after: Tensor | None = None) -> Tensor:
        return x.new_empty(x.shape[0] + operator.added_halos * num_halo, *x.shape[1:])

    def without_rows(x: Tensor, handle: int, num_halo: int, after: Tensor | None = None) -> Tensor:
        return x.new_empty(x.shape)

    qualified = f"{NAMESPACE}::{name}"
    schema = "(Tensor x, SymInt handle, SymInt num_halo, Tensor? after=None) -> Tensor"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake if operator.added_halos else without_rows)


for _name, _operator in _OPERATORS.items():
    _register(_name, _operator)
